"""Accuracy and loss of a model on a split, batch by batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.step.feeds import Feed
from experiments.step.layout import Layout


class Evaluation(NamedTuple):
    """The means over the examples of a split.

    Attributes:
        accuracy: share of correct predictions; NaN if a logit is not finite.
        loss: cross-entropy, without label smoothing.
    """

    accuracy: float
    loss: float


Predict = Callable[[Any, Any, jax.Array], jax.Array]
Sums = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], jax.Array]


def make_predict(
    apply: Callable[..., tuple[jax.Array, Any]], normalise: Callable[[jax.Array], jax.Array]
) -> Predict:
    """Returns `predict(params, stats, images)`: float32[examples, classes], the logits.

    Args:
        apply: the model.
        normalise: maps stored images to the model's inputs.
    """
    return lambda params, stats, images: apply(params, stats, normalise(images), train=False)[0]


def make_sums(predict: Predict) -> Sums:
    """Returns `sums(params, stats, images, labels, counted)`: float32[2].

    The first sum counts correct predictions. The second one adds up losses.
    """

    def sums(
        params: Any, stats: Any, images: jax.Array, labels: jax.Array, counted: jax.Array
    ) -> jax.Array:
        logits = predict(params, stats, images)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = logits.argmax(-1) == labels
        # Otherwise NaN logits would count as class 0.
        right = jnp.where(jnp.isfinite(logits).all(-1), right, jnp.nan)
        return jnp.where(counted, jnp.stack([right, losses]), 0).sum(-1)

    return sums


def make_evaluate(
    sums: Sums, batch_size: int, layout: Layout
) -> Callable[[Any, Any, Feed], Evaluation]:
    """Returns `evaluate(params, stats, feed)`, with running statistics and without dropout.

    Args:
        sums: see :func:`make_sums`.
        batch_size: approximate number of examples in memory at once. The results do not depend
            on it.
        layout: layout of the batches over the devices.
    """
    batch_size = -(-batch_size // layout.parts) * layout.parts

    @functools.partial(jax.jit, out_shardings=layout.whole)
    def laid_out(params: Any, stats: Any, *batch: jax.Array) -> jax.Array:
        return sums(params, stats, *layout.constrained(batch))

    def evaluate(params: Any, stats: Any, feed: Feed) -> Evaluation:
        totals = [laid_out(params, stats, *batch) for batch in feed.batches(batch_size)]
        sum_ = np.sum([np.asarray(total, np.float64) for total in totals], axis=0)
        accuracy, loss = sum_ / feed.examples
        return Evaluation(float(accuracy), float(loss))

    return evaluate
