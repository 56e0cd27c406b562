"""Slices of the loss: along the direction of ascent and along a random one.

Both directions are normalized filter by filter: each filter of a direction has the norm of the
filter of the network, and biases and scales stay as they are. So slices of networks with weights of
different scales can be compared.

References:
    Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_,
    2018
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.measures.sharpness import loss_of
from experiments.measures.trained import Trained, over_seeds
from experiments.step.evaluation import Predict


class Slices(NamedTuple):
    """Losses along two directions.

    Attributes:
        places: float32[points], multiples of the directions, from -1 to 1.
        ascent: float32[seeds, points], losses along the direction of ascent.
        random: float32[seeds, points], losses along the random direction.
        plane: float32[points, points], losses of the first seed in the plane of both; the first
            axis is the direction of ascent.
    """

    places: np.ndarray
    ascent: np.ndarray
    random: np.ndarray
    plane: np.ndarray


def filter_normalised(direction: Any, params: Any) -> Any:
    """Returns a direction whose filters have the norms of the filters of `params`.

    The last axis of a kernel is the filter. Arrays with fewer than two axes become zero.
    """

    def of_leaf(d: jax.Array, w: jax.Array) -> jax.Array:
        if w.ndim < 2:
            return jnp.zeros_like(w)
        axes = tuple(range(w.ndim - 1))
        norm, of_weights = (jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (d, w))
        return jnp.where(norm > 0, d * of_weights / jnp.where(norm > 0, norm, 1.0), 0.0)

    return jax.tree.map(of_leaf, direction, params)


def measured_slices(trained: Trained, points: int, normalised_logits: bool) -> Slices:
    """Measures the loss on the training examples along both directions.

    Args:
        trained: the networks.
        points: number of places along each direction, an odd number.
        normalised_logits: see :class:`experiments.measures.sharpness.Measures`.
    """
    directions, along, single = _programs(trained.predict, normalised_logits)
    images, all_labels = trained.train
    arguments = (trained.params, trained.stats, images, all_labels)
    both = directions(*arguments)
    places = np.linspace(-1, 1, points, dtype=np.float32)

    def line(direction: int) -> np.ndarray:
        steps = places[:, None] * np.eye(2, dtype=np.float32)[direction]
        return np.stack([along(*arguments, both, jnp.asarray(step)) for step in steps], axis=1)

    params, stats, labels, of_first = jax.tree.map(
        lambda x: x[0], (trained.params, trained.stats, all_labels, both)
    )
    plane = [
        [single(params, stats, images, labels, of_first, jnp.asarray((a, b))) for b in places]
        for a in places
    ]
    return Slices(places, line(0), line(1), np.asarray(jax.device_get(plane)))


@functools.cache
def _programs(predict: Predict, normalised_logits: bool) -> tuple[Any, ...]:
    """Returns the directions, the loss along them for all seeds, and the same for one seed."""

    def directions(params: Any, stats: Any, *batch: jax.Array) -> Any:
        loss = loss_of(predict, stats, normalised_logits)
        gradient = jax.grad(lambda at: loss(at, batch).mean())(params)
        normal = optax.tree.random_like(jax.random.key(3), params, jax.random.normal)
        return filter_normalised(gradient, params), filter_normalised(normal, params)

    def at(
        params: Any, stats: Any, images: jax.Array, labels: jax.Array, both: Any, steps: jax.Array
    ) -> jax.Array:
        moved = jax.tree.map(lambda w, a, b: w + steps[0] * a + steps[1] * b, params, *both)
        return loss_of(predict, stats, normalised_logits)(moved, (images, labels)).mean()

    axes = (0, 0, None, 0)
    return (
        over_seeds(directions, axes),
        over_seeds(at, (*axes, 0, None)),
        jax.jit(at),
    )
