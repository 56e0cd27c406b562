"""Attacks on images: steps of projected gradient descent, and adversarial training.

Pixels are in [0, 1]. The last three axes of an array are one image.

References:
    Madry et al., `Towards Deep Learning Models Resistant to Adversarial Attacks
    <https://arxiv.org/abs/1706.06083>`_, 2018
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.step.method import PerExampleLoss
from experiments.step.train_step import Batch, Step, TrainState, keys_of

# Radii are given in units of pixels with 256 values.
LEVELS = 255


def random_start(key: jax.Array, clean: jax.Array, norm: str, radius: Any) -> jax.Array:
    """Returns pixels at a random place in the ball of each image."""
    if norm == "linf":
        noise = jax.random.uniform(key, clean.shape, clean.dtype, -1, 1)
        return jnp.clip(clean + radius * noise, 0, 1)
    along, how_far = jax.random.split(key)
    direction = jax.random.normal(along, clean.shape, clean.dtype)
    share = jax.random.uniform(how_far, (*clean.shape[:-3], 1, 1, 1), clean.dtype)
    return jnp.clip(clean + share * radius * direction / _norms(direction), 0, 1)


def ascended(
    clean: jax.Array, at: jax.Array, gradient: jax.Array, norm: str, radius: Any, step: Any
) -> jax.Array:
    """Moves the pixels along the gradient, back into the ball, and back into [0, 1]."""
    if norm == "linf":
        moved = at + step * jnp.sign(gradient) - clean
        return jnp.clip(clean + jnp.clip(moved, -radius, radius), 0, 1)
    norms = _norms(gradient)
    direction = jnp.where(norms > 0, gradient / jnp.where(norms > 0, norms, 1), 0)
    moved = at + step * direction - clean
    lengths = _norms(moved)
    inside = moved * jnp.minimum(1, radius / jnp.where(lengths > 0, lengths, 1))
    return jnp.clip(clean + inside, 0, 1)


def usual_step(norm: str, radius: float) -> float:
    """Returns the usual step size: a quarter (linf) or an eighth (l2) of the radius."""
    return radius / (4 if norm == "linf" else 8)


def attacked_step(
    step: Step,
    apply: Callable[..., tuple[jax.Array, Any]],
    loss: PerExampleLoss,
    norm: str,
    radius: Any,
    steps: int,
    to_pixels: Callable[[jax.Array], jax.Array],
    from_pixels: Callable[[jax.Array], jax.Array],
) -> Step:
    """Returns `step` on attacked images: adversarial training.

    The attack uses the statistics of the batch, and leaves the running ones alone.

    Args:
        step: a step on the images of a batch.
        apply: the model.
        loss: the loss to ascend over the images.
        norm: "linf" or "l2".
        radius: in units of 1/255; may be traced.
        steps: number of gradients of the attack.
        to_pixels: maps the inputs of the model to pixels.
        from_pixels: maps pixels to the inputs of the model.
    """
    radius = radius / LEVELS

    def attacked(state: TrainState, batch: Batch) -> Batch:
        keys = keys_of(state)
        start, dropout = (
            jax.random.fold_in(key, state.step) for key in (keys.augmentation, keys.dropout)
        )
        # Neither depends on how the batch is split.
        starts, masks = (
            jax.vmap(jax.random.fold_in, (None, 0))(key, batch.positions)
            for key in (jax.random.fold_in(start, 1), dropout)
        )
        clean = jnp.clip(to_pixels(batch.images), 0, 1)

        def total(pixels: jax.Array) -> jax.Array:
            images = from_pixels(pixels)
            logits, _ = apply(state.params, state.stats, images, train=True, keys=masks)
            return loss(logits, batch.labels).sum()

        def ascend(_: Any, at: jax.Array) -> jax.Array:
            size = usual_step(norm, radius)
            return ascended(clean, at, jax.grad(total)(at), norm, radius, size)

        at = jax.vmap(lambda key, image: random_start(key, image, norm, radius))(starts, clean)
        at = jax.lax.fori_loop(0, steps, ascend, at)
        return batch._replace(images=from_pixels(at))

    return lambda state, batch: step(state, attacked(state, batch))


def _norms(x: jax.Array) -> jax.Array:
    """Returns the l2 norm of each image."""
    return jnp.sqrt(jnp.square(x).sum((-3, -2, -1), keepdims=True))
