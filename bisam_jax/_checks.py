"""Checks of concrete arguments; the values of traced ones pass unseen."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    # As the default floating dtype has it: 1e39 is infinite in float32, and 1e-46 is zero.
    with np.errstate(over="ignore"):
        number = float(np.asarray(value, jnp.result_type(float)))
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


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is a positive integer; of a tracer, only the dtype is checked.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is not a scalar, or less than 1.
    """
    check_scalar(name, value, minimum=1)
    if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}.")


def as_key(key: Any) -> jax.Array:
    """A random key: the given one, or the one of an integer seed."""
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_key else jax.random.key(key)


def check_transformation(name: str, value: Any) -> None:
    """Raises unless `value` is an optax transformation.

    Raises:
        TypeError: if it is anything else.
    """
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax transformation, such as the result of bisam(rho) or "
            f"l2_ball(rho), got {value!r} of type {type(value).__name__}."
        )


def check_loss(name: str, value: Any) -> Any:
    """Returns what the user's loss function `name` returned, if it is a real floating scalar.

    Raises:
        TypeError: if it is anything else.
    """
    leaves = [] if value is None else jax.tree.leaves(value)
    is_scalar = len(leaves) == 1 and leaves[0] is value and jnp.shape(leaves[0]) == ()
    if not is_scalar or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        got = jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", value)
        raise TypeError(
            f"{name} must return one real floating scalar, got {got}: take the mean over the "
            "batch, and return auxiliary outputs only in bisam_jax.value_and_grad(has_aux=True)."
        )
    return value
