"""Checks of arguments: types and shapes always, values only where they are concrete."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from bisam_jax._keys import is_key


def check_scalar(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    exclusive: bool = False,
    exclusive_maximum: bool = False,
) -> None:
    """Raises unless `value` is one finite real number within the bounds.

    Args:
        name: name of the argument, used in the message.
        value: a number, or a NumPy or JAX scalar. For a tracer, only shape and dtype are checked.
        minimum: smallest allowed value, or the largest refused one if `exclusive`.
        maximum: largest allowed value, or the smallest refused one if `exclusive_maximum`.
        exclusive: whether `minimum` itself is refused.
        exclusive_maximum: whether `maximum` itself is refused.

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
            f"{name} must be a scalar, got shape {np.shape(value)}: for several, use jax.vmap."
        )
    if isinstance(value, Tracer):
        return
    # Rounded to the default floating dtype: in float32, 1e39 is infinite and 1e-46 is zero.
    with np.errstate(over="ignore"):
        number = float(np.asarray(value, jnp.result_type(float)))
    too_small = number <= minimum if exclusive else number < minimum
    too_large = number >= maximum if exclusive_maximum else number > maximum
    if not math.isfinite(number) or too_small or too_large:
        lower = f", {'>' if exclusive else '>='} {minimum:g}" if minimum > -math.inf else ""
        upper = f", {'<' if exclusive_maximum else '<='} {maximum:g}" if maximum < math.inf else ""
        raise ValueError(f"{name} must be finite{lower}{upper}, got {number}.")


def _is_real(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.generic, np.ndarray, jax.Array)
    ):
        return False
    dtype = jnp.result_type(value)
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def _is_integer(value: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(value), jnp.integer))


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is a positive integer. For a tracer, the value is not checked.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is not a scalar, or less than 1.
    """
    check_scalar(name, value, minimum=1)
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}.")


def check_static(name: str, value: Any) -> None:
    """Raises if `value` is traced, since the shapes of the program depend on it.

    Raises:
        TypeError: names `static_args`, since `optax.inject_hyperparams` is the likely cause.
    """
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} sets array shapes, so it cannot be traced: under optax.inject_hyperparams, "
            f"pass static_args={name!r}."
        )


def check_key(key: Any) -> None:
    """Raises unless `key` is one random key or an integer seed.

    Raises:
        TypeError: if it is anything else.
    """
    if (not is_key(key) and not (_is_real(key) and _is_integer(key))) or np.shape(key) != ():
        raise TypeError(
            "key must be one random key, such as jax.random.key(0), or an integer seed, got "
            f"{key!r}."
        )


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


def check_scalar_loss(name: str, value: Any) -> Any:
    """Returns `value`, the output of the loss function `name`, if it is one real floating scalar.

    Raises:
        TypeError: if it is anything else.
    """
    if not is_floating_array(value) or jnp.shape(value) != ():
        raise TypeError(
            f"{name} must return one real floating scalar, got {shapes_of(value)}: take the mean "
            "over the batch, or use bisam_jax.value_and_grad, which takes one loss per example "
            "and auxiliary outputs (has_aux=True)."
        )
    return value


def is_floating_array(value: Any) -> bool:
    """Returns whether `value` is one real floating array or number."""
    leaves = [] if value is None else jax.tree.leaves(value)
    is_leaf = len(leaves) == 1 and leaves[0] is value
    return is_leaf and bool(jnp.issubdtype(jnp.result_type(value), jnp.floating))


def shapes_of(tree: Any) -> Any:
    """Returns the tree with each leaf replaced by its dtype and shape, for messages."""
    return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree)


def check_params(params: Any) -> None:
    """Raises if `update` was given no parameters, or masked ones.

    Raises:
        ValueError: if they are missing, or masked by `optax.masked` or `optax.partition`.
    """
    if params is None:
        raise ValueError("params is missing: call update(grads, state, params, loss_fn=...).")
    check_not_masked(params)


def check_not_masked(params: Any) -> None:
    """Raises inside `optax.masked`, which would pass masked parameters to the user's functions."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            "optax.masked (or optax.partition) around a sharpness-aware transformation would pass "
            "masked parameters to loss_fn. To perturb only some leaves, freeze the other leaves "
            "before the ball: "
            "sharpness_aware(optax.chain(optax.transforms.freeze(mask), l2_ball(rho))). To train "
            "only some leaves, mask the transformations that come after it in the chain."
        )


def check_same_structure(name: str, tree: Any, params: Any) -> None:
    """Raises unless `tree` has the structure and the leaf shapes of `params`.

    Raises:
        ValueError: says which tree and which leaf differ, and how.
    """
    got, expected = (
        {
            jax.tree_util.keystr(path): jnp.shape(leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]
        }
        for part in (tree, params)
    )
    for path in expected:
        if path not in got:
            raise ValueError(f"{name} does not match params: no leaf at {path or 'the root'}.")
        if got[path] != expected[path]:
            raise ValueError(
                f"{name} does not match params: shape {got[path]} at {path or 'the root'}, "
                f"where params has {expected[path]}."
            )
    for path in got:
        if path not in expected:
            raise ValueError(
                f"{name} does not match params, which has no leaf at {path or 'the root'}."
            )
    structures = jax.tree.structure(tree), jax.tree.structure(params)
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name} does not match params: its containers are {structures[0]}, but the containers "
            f"of params are {structures[1]}."
        )


class MissingArgumentError(ValueError):
    """Raised if a call lacks an argument that the method needs.

    A method is called by `update` or by `value_and_grad`. What the user must change differs.

    Args:
        problem: what is missing and why it is needed.
        in_update: what to pass to `update`.
        in_value_and_grad: what to pass to `value_and_grad`.
    """

    def __init__(self, problem: str, in_update: str, in_value_and_grad: str) -> None:
        super().__init__(f"{problem}: {in_update}.")
        self.for_value_and_grad = f"{problem}: {in_value_and_grad}."
