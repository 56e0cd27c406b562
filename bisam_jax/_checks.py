"""Checks of concrete arguments; the values of traced ones pass unseen."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_scalar(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    exclusive: bool = False,
) -> None:
    """Raises unless `value` is one finite real number within the bounds.

    Args:
        name: the argument's name, for the message.
        value: a number, or a NumPy or JAX scalar; of a tracer, only shape and dtype are checked.
        minimum: least allowed value, or the greatest refused one if `exclusive`.
        maximum: greatest allowed value.
        exclusive: whether `minimum` itself is refused.

    Raises:
        TypeError: if `value` is not a real number.
        ValueError: if it is not a scalar, not finite, or out of bounds.
    """
    if not _is_real(value):
        raise TypeError(
            f"{name} must be a real number, got {value!r} of type {type(value).__name__}."
        )
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}; jax.vmap runs several at once."
        )
    if isinstance(value, Tracer):
        return
    number = float(value)
    too_small = number <= minimum if exclusive else number < minimum
    if not math.isfinite(number) or too_small or number > maximum:
        raise ValueError(
            f"{name} must be finite{_bounds(minimum, maximum, exclusive)}, got {number}."
        )


def _is_real(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.generic, np.ndarray, jax.Array)
    ):
        return False
    dtype = jnp.result_type(value)
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def _bounds(minimum: float, maximum: float, exclusive: bool) -> str:
    lower = f", {'>' if exclusive else '>='} {minimum:g}" if minimum > -math.inf else ""
    upper = f", <= {maximum:g}" if maximum < math.inf else ""
    return lower + upper


def check_loss(name: str, value: Any) -> Any:
    """Returns what the user's loss function `name` returned, if it is a real floating scalar.

    Raises:
        TypeError: if it is anything else.
    """
    is_array = jax.tree_util.treedef_is_leaf(jax.tree.structure(value))
    if (
        not is_array
        or jnp.shape(value) != ()
        or not jnp.issubdtype(jnp.result_type(value), jnp.floating)
    ):
        got = jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", value)
        raise TypeError(
            f"{name} must return one real floating scalar, got {got}: take the mean over the "
            "batch, and return auxiliary outputs only in bisam_jax.value_and_grad(has_aux=True)."
        )
    return value
