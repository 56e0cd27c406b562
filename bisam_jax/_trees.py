"""Operations on trees of parameters and gradients, with norms in float32 or wider."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any


def float_part(tree: Tree) -> Tree:
    """Returns the floating leaves, in float32 or wider, and None in place of other leaves.

    Perturbations are computed on this part: integers, booleans and random keys have no direction
    of ascent, and in bfloat16 most of a small perturbation would be rounded away.

    Raises:
        TypeError: at a complex leaf.
    """

    def cast(leaf: Any) -> Any:
        if not is_floating(leaf):
            return None
        dtype = at_least_float32(_dtype(leaf))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=dtype)
        return jnp.asarray(leaf, dtype)

    return jax.tree.map(cast, tree)


def is_floating(leaf: Any) -> bool:
    """Returns whether a leaf is a real floating array or scalar.

    Raises:
        TypeError: at a complex leaf.
    """
    dtype = _dtype(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"complex parameters are not supported, got a leaf of dtype {dtype}: "
            "store its real and imaginary parts as two parameters."
        )
    return bool(jnp.issubdtype(dtype, jnp.floating))


def at_least_float32(*dtypes: Any) -> Any:
    """Returns the widest of the given floating dtypes and float32."""
    return max([*dtypes, jnp.dtype(jnp.float32)], key=lambda dtype: jnp.finfo(dtype).bits)


def _dtype(leaf: Any) -> Any:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    # NumPy's default is float64, which JAX stores as float32 unless x64 is enabled.
    return jax.dtypes.canonicalize_dtype(dtype) if dtype == np.float64 else dtype


def spread(where: Tree, tree: Tree) -> Tree:
    """Returns a mask with a boolean for each leaf of `tree`, from a tree of booleans or a prefix.

    Raises:
        ValueError: if `where` does not fit.
    """
    try:
        return jax.tree.map(lambda use, part: jax.tree.map(lambda _: bool(use), part), where, tree)
    except ValueError as error:
        raise ValueError(
            "where must be a tree of booleans with the structure of params or a prefix of it, got "
            f"{jax.tree.structure(where)} for {jax.tree.structure(tree)}."
        ) from error


def fill_with_zeros(gradient: Tree, params: optax.Params) -> Tree:
    """Returns a gradient in the parameters' dtypes, with zeros in place of None.

    Random keys, which have no zero, get JAX's float0.
    """

    def fill(p: Any, g: Any) -> Any:
        if g is not None:
            return jnp.asarray(g, _dtype(p))
        if jnp.issubdtype(_dtype(p), jax.dtypes.extended):
            return np.zeros(p.shape, jax.dtypes.float0)
        return jnp.zeros_like(p)

    return jax.tree.map(fill, params, gradient)


def merge(floats: Tree, params: optax.Params) -> optax.Params:
    """Returns `params` with the floating leaves taken from `floats`."""
    return jax.tree.map(lambda f, p: p if f is None else f, floats, params, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def as_cotangent(gradient: Tree, params: optax.Params) -> Tree:
    """Returns a gradient as a JAX cotangent of `params`, with float0 in place of None."""

    def fill(p: Any, g: Any) -> Any:
        return np.zeros(jnp.shape(p), jax.dtypes.float0) if g is None else jnp.asarray(g, _dtype(p))

    return jax.tree.map(fill, params, gradient)


def perturb(params: optax.Params, eps: Tree) -> optax.Params:
    """Returns `params + eps`, in float32 or wider; leaves with None in `eps` are unchanged."""

    def add(offset: Any, leaf: Any) -> Any:
        if offset is None:
            return leaf
        dtype = at_least_float32(_dtype(leaf))
        return jnp.asarray(leaf, dtype) + jnp.asarray(offset, dtype)

    return jax.tree.map(add, eps, params, is_leaf=_is_none)


def scale_to_norm(tree: Tree, norm: jax.typing.ArrayLike) -> Tree:
    """Returns the tree scaled to the given global L2 norm, in its dtypes; 0 for a zero tree.

    Every finite tree works: dividing by the largest magnitude before squaring keeps the squares of
    float32 values as small as 1e-21 or as large as 1e19 in range. An infinite or NaN leaf makes
    the whole result NaN. Leaves that are not floating count as zero.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if is_floating(leaf) and jnp.size(leaf) > 0]
    if not leaves:
        return jax.tree.map(jnp.zeros_like, tree)
    largest, scale = _scale_of(leaves)
    dtype, is_zero = scale.dtype, largest < jnp.finfo(scale.dtype).tiny
    squares = fold(
        jnp.add, [jnp.sum(jnp.square(jnp.asarray(leaf, dtype) / scale)) for leaf in leaves]
    )
    factor = jnp.asarray(norm, dtype) / jnp.sqrt(jnp.where(is_zero, 1, squares))
    factor = jnp.where(is_zero, 0, jnp.where(jnp.isinf(largest), jnp.nan, factor))

    def rescale(leaf: Any) -> jax.Array:
        if not is_floating(leaf):
            return jnp.zeros_like(leaf)
        return (jnp.asarray(leaf, dtype) / scale * factor).astype(_dtype(leaf))

    return jax.tree.map(rescale, tree)


def _scale_of(leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
    """Returns the largest magnitude, and a number to divide by before squares are taken."""
    dtype = at_least_float32(*map(_dtype, leaves))
    magnitudes = [jnp.max(jnp.abs(leaf)).astype(dtype) for leaf in leaves]
    # What is computed with the scale does not depend on it, so neither does a derivative.
    largest = jax.lax.stop_gradient(fold(jnp.maximum, magnitudes))
    tiny = jnp.finfo(dtype).tiny
    # XLA divides by multiplying with the reciprocal, which must not be subnormal.
    return largest, jnp.clip(largest, tiny, 1 / tiny)


def global_norm(tree: Tree) -> jax.Array:
    """Returns the L2 norm of all floating leaves together, in float32 or wider."""
    # `scale_to_norm` keeps the squares in range.
    unit = scale_to_norm(float_part(tree), 1.0)
    return vdot(unit, tree)


def vdot(a: Tree, b: Tree) -> jax.Array:
    """Returns the inner product of the floating leaves, in float32 or wider."""
    pairs = zip(*(jax.tree.leaves(float_part(tree)) for tree in (a, b)), strict=True)
    dtype = at_least_float32(*map(_dtype, jax.tree.leaves(float_part(a))))
    products = [jnp.sum(jnp.asarray(x, dtype) * jnp.asarray(y, dtype)) for x, y in pairs]
    return fold(jnp.add, products) if products else jnp.zeros([], dtype)


def orthogonal_part(tree: Tree, direction: Tree) -> Tree:
    """Returns the tree without its part along a direction.

    No unit vector is made, which would take the memory of a tree.
    """
    leaves = [leaf for leaf in jax.tree.leaves(direction) if jnp.size(leaf) > 0]
    if not leaves:
        return tree
    largest, scale = _scale_of(leaves)
    dtype, is_zero = scale.dtype, largest < jnp.finfo(scale.dtype).tiny

    def scaled(leaf: Any) -> jax.Array:
        return jnp.asarray(leaf, dtype) / scale

    squares = fold(jnp.add, [jnp.sum(jnp.square(scaled(leaf))) for leaf in leaves])
    along = vdot(tree, jax.tree.map(scaled, direction)) / jnp.where(is_zero, 1, squares)
    along = jnp.where(is_zero, 0, jnp.where(jnp.isinf(largest), jnp.nan, along))
    return jax.tree.map(
        lambda x, d: (x - along * scaled(d)).astype(jnp.result_type(x)), tree, direction
    )


def fold(combine: Callable[[Any, Any], Any], scalars: list[jax.Array]) -> jax.Array:
    """Combines scalars, one per leaf: to their sum, or to their maximum if none is negative.

    The factor that scales every leaf depends on all scalars. XLA on CPU copies such a chain of
    operations into the program of each leaf, so the compile time grows with the square of the
    number of leaves. It cannot copy a loop, so there is one here. The loop is as long as the square
    root of the number of leaves, which costs little on an accelerator.
    """
    size = math.isqrt(len(scalars))
    parts = [scalars[i : i + size] for i in range(0, len(scalars), size)]
    stacked = jnp.stack([functools.reduce(combine, part) for part in parts])
    return _fold_in_a_loop(combine, stacked)


# jit compiles this once per length. Outside of jit, each call would compile its own loop body.
@functools.partial(jax.jit, static_argnames="combine")
def _fold_in_a_loop(combine: Callable[[Any, Any], Any], scalars: jax.Array) -> jax.Array:
    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return combine(total, scalars[i])

    return jax.lax.fori_loop(0, len(scalars), add, jnp.zeros_like(scalars[0]))


def for_base_optimizer(
    gradient: optax.Updates, grads: optax.Updates | None, params: optax.Params
) -> optax.Updates:
    """Returns the descent gradient in the parameters' dtypes; other leaves come from `grads`."""

    def cast(p: Any, g: Any, fallback: Any) -> Any:
        return jnp.asarray(g, _dtype(p)) if is_floating(p) else fallback

    if grads is None:
        return fill_with_zeros(float_part(gradient), params)
    return jax.tree.map(cast, params, gradient, grads)
