"""Checks that logits, labels and masks fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bisam_jax._trees import at_least_float32

if TYPE_CHECKING:
    from jaxtyping import ArrayLike


def check_logits(logits: ArrayLike, labels: ArrayLike, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns both as arrays, logits in float32 or wider, if dtypes and shapes fit."""
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating, got dtype {logits.dtype}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers (class indices), got dtype {labels.dtype}: this loss is for "
            "classification only. For one-hot labels, pass labels.argmax(-1); for soft labels or "
            "regression, pass your own perturbation loss to the method."
        )
    if not isinstance(axis, int):
        raise TypeError(f"axis must be an integer, got {axis!r}.")
    if not -logits.ndim <= axis < logits.ndim:
        raise ValueError(f"axis {axis} is out of bounds for logits of shape {logits.shape}.")
    axis %= logits.ndim
    expected = logits.shape[:axis] + logits.shape[axis + 1 :]
    if labels.shape != expected:
        raise ValueError(
            f"labels must have the shape of logits without axis {axis}, {expected}, got "
            f"{labels.shape} for logits of shape {logits.shape}."
        )
    return logits.astype(at_least_float32(logits.dtype)), labels.astype(jnp.int32)


def check_range(labels: ArrayLike, classes: int) -> None:
    """Raises if a concrete label is not a class."""
    if isinstance(labels, Tracer) or np.size(labels) == 0:
        return
    known = np.asarray(labels)
    smallest, largest = int(known.min()), int(known.max())
    if smallest < 0 or largest >= classes:
        raise ValueError(
            f"labels must be in [0, {classes}), the number of classes in logits, got "
            f"{smallest if smallest < 0 else largest}; mask padded examples with where, as in "
            "perturbation_loss(logits, labels, where=labels != -100)."
        )


def where_any_class(where: jax.Array | np.ndarray, labels: ArrayLike, axis: int) -> ArrayLike:
    """Returns the labels, with 0 for examples whose classes are all masked."""
    if isinstance(where, Tracer) or isinstance(labels, Tracer):
        return jnp.where(jnp.asarray(where).any(axis), jnp.asarray(labels), 0)
    return np.where(np.asarray(where).any(axis), np.asarray(labels), 0)


def class_mask(where: ArrayLike, shape: tuple[int, ...], axis: int) -> jax.Array | np.ndarray:
    """Returns `where` as a mask in the shape of logits, as a NumPy array unless it is traced."""
    # A NumPy mask stays concrete under jit, so the labels that it keeps can be checked.
    xp = jnp if isinstance(where, Tracer) else np
    mask = xp.asarray(where)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"where must be booleans, got dtype {mask.dtype}.")
    if mask.ndim == len(shape) - 1:
        mask = xp.expand_dims(mask, axis)
    try:
        return xp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"where must have the shape of logits, {shape}, or of labels, got {jnp.shape(where)}."
        ) from None
