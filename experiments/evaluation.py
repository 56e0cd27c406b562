"""Accuracy and loss of a model on a split, in batches."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import Split, Stream
from experiments.layout import Layout


class Evaluation(NamedTuple):
    """Means over a split's examples.

    Attributes:
        accuracy: share of right predictions; NaN if a logit is not finite.
        loss: cross-entropy, without label smoothing.
    """

    accuracy: float
    loss: float


Sums = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], jax.Array]


def make_sums(
    apply: Callable[..., tuple[jax.Array, Any]], normalise: Callable[[jax.Array], jax.Array]
) -> Sums:
    """`sums(params, stats, images, labels, counted)`: of right predictions and losses, float32[2].

    Args:
        apply: the model.
        normalise: from stored images to the model's.
    """

    def sums(
        params: Any, stats: Any, images: jax.Array, labels: jax.Array, counted: jax.Array
    ) -> jax.Array:
        logits, _ = apply(params, stats, normalise(images), train=False)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = logits.argmax(-1) == labels
        # The largest of logits that are not finite would be class 0.
        right = jnp.where(jnp.isfinite(logits).all(-1), right, jnp.nan)
        return jnp.where(counted, jnp.stack([right, losses]), 0).sum(-1)

    return sums


def make_evaluate(
    sums: Sums,
    batch_size: int,
    layout: Layout,
) -> Callable[[Any, Any, Split | Stream], Evaluation]:
    """`evaluate(params, stats, split)` with the running statistics and without dropout.

    Args:
        sums: see :func:`make_sums`.
        batch_size: about how many examples are in memory at once; the results do not depend on it.
        layout: of the batches over the devices.
    """
    batch_size = -(-batch_size // layout.parts) * layout.parts

    @functools.partial(jax.jit, out_shardings=layout.whole)
    def laid_out(params: Any, stats: Any, *batch: jax.Array) -> jax.Array:
        return sums(params, stats, *layout.constrained(batch))

    def evaluate(params: Any, stats: Any, split: Split | Stream) -> Evaluation:
        totals = [laid_out(params, stats, *batch) for batch in _batches(split, batch_size, layout)]
        sum_ = np.sum([np.asarray(total, np.float64) for total in totals], axis=0)
        accuracy, loss = sum_ / num_examples(split)
        return Evaluation(float(accuracy), float(loss))

    return evaluate


def num_examples(split: Split | Stream) -> int:
    """How many examples there are in a split."""
    return len(split) if isinstance(split, Stream) else len(split.labels)


def windows(examples: int, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Parts of one size that cover all examples, and which of a part were in none before."""
    size = min(size, examples)
    for first in range(0, examples, size):
        start = min(first, examples - size)
        yield slice(start, start + size), np.arange(start, start + size) >= first


def _batches(
    split: Split | Stream, size: int, layout: Layout
) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """Images, labels and which of them count: all batches of a split have one size."""
    examples = num_examples(split)
    if isinstance(split, Stream):
        here = layout.rows_here(size)
        for number, rows in enumerate(split.batches(size, here)):
            filled = jax.tree.map(lambda x: _padded(x, len(here)), rows)
            counted = np.arange(size) < examples - number * size
            yield *layout.batch(filled, size), counted
        return
    size = min(size, -(-examples // layout.parts) * layout.parts)
    if examples < size:
        # Devices share batches evenly.
        filled = Split(*(_padded(x, size) for x in split))
        yield *filled, np.arange(size) < examples
        return
    for part, counted in windows(examples, size):
        images = jax.lax.slice_in_dim(split.images, part.start, part.stop)
        yield images, jax.lax.slice_in_dim(split.labels, part.start, part.stop), counted


def _padded(x: Any, size: int) -> Any:
    """`x` with a first axis of `size`, filled up with zeros."""
    pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
    return pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
