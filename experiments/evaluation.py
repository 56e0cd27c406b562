"""Accuracy and loss of a model on a split, in batches."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import Split, Stream


class Evaluation(NamedTuple):
    """Means over a split's examples.

    Attributes:
        accuracy: share of right predictions; NaN if a logit is not finite.
        loss: cross-entropy, without label smoothing.
    """

    accuracy: float
    loss: float


def make_evaluate(
    apply: Callable[..., tuple[jax.Array, Any]],
    normalise: Callable[[jax.Array], jax.Array],
    batch_size: int,
) -> Callable[[Any, Any, Split | Stream], Evaluation]:
    """`evaluate(params, stats, split)` with the running statistics and without dropout.

    Args:
        apply: the model.
        normalise: from stored images to the model's.
        batch_size: examples that are in memory at once; the results do not depend on it.
    """

    @jax.jit
    def sums(params: Any, stats: Any, images: jax.Array, labels: jax.Array, counted: jax.Array):
        logits, _ = apply(params, stats, normalise(images), train=False)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = logits.argmax(-1) == labels
        # The largest of logits that are not finite would be class 0.
        right = jnp.where(jnp.isfinite(logits).all(-1), right, jnp.nan)
        return jnp.where(counted, jnp.stack([right, losses]), 0).sum(-1)

    def evaluate(params: Any, stats: Any, split: Split | Stream) -> Evaluation:
        totals = [sums(params, stats, *batch) for batch in _batches(split, batch_size)]
        sum_ = np.sum([np.asarray(total, np.float64) for total in totals], axis=0)
        accuracy, loss = sum_ / num_examples(split)
        return Evaluation(float(accuracy), float(loss))

    return evaluate


def num_examples(split: Split | Stream) -> int:
    """How many examples there are in a split."""
    return len(split) if isinstance(split, Stream) else len(split.labels)


def _batches(split: Split | Stream, size: int) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """Images, labels and which of them count: all batches of a split have one size."""
    if isinstance(split, Stream):
        for images, labels in split.batches(size):
            missing = size - len(labels)
            padded = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
            yield padded, np.pad(labels, (0, missing)), np.arange(size) < len(labels)
        return
    examples = len(split.labels)
    size = min(size, examples)
    for first in range(0, examples, size):
        start = min(first, examples - size)
        yield (
            jax.lax.dynamic_slice_in_dim(split.images, start, size),
            jax.lax.dynamic_slice_in_dim(split.labels, start, size),
            np.arange(start, start + size) >= first,
        )
