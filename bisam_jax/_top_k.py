"""Masks over a whole tree, such as the mask of its largest entries."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bisam_jax._trees import at_least_float32


def size_of(tree: Any) -> int:
    """Returns the number of entries of all leaves together."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


def number_of(rounding: Callable[[Any], Any], n: int, share: Any) -> Any:
    """Returns `n * share`, rounded by `math.floor` or `math.ceil`.

    A concrete share gives a Python integer, computed in double precision. A traced share gives an
    int32 scalar.
    """
    if isinstance(share, (int, float)):
        return rounding(n * share)
    traced = {math.floor: jnp.floor, math.ceil: jnp.ceil}[rounding]
    return traced(n * jnp.asarray(share, jnp.result_type(float))).astype(jnp.int32)


def masked(tree: Any, mask: Any) -> Any:
    """Returns the tree where `mask` is True, and 0 elsewhere."""
    return jax.tree.map(lambda m, x: jnp.where(m, x, 0), mask, tree)


def top_k_mask(scores: Any, k: jax.typing.ArrayLike) -> Any:
    """Returns a mask of the `k` largest entries of all leaves together; among ties, the first.

    The k-th largest score is found bit by bit, since non-negative floats have the order of their
    bits. The last tied entry to keep is found in the same way, by the bits of its position. Each
    bit takes one count over the leaves: nothing is sorted, and no sharded leaf is gathered.

    Args:
        scores: a tree of non-negative floating arrays.
        k: number of entries, an int32 scalar, possibly traced.

    Returns:
        A tree of booleans in the shapes of `scores`, exactly `k` of them True.
    """
    leaves, structure = jax.tree.flatten(scores)
    if not leaves:
        return scores
    dtype = at_least_float32(*(leaf.dtype for leaf in leaves))
    width = jnp.finfo(dtype).bits
    unsigned = jnp.dtype(f"uint{width}")
    bits = [jax.lax.bitcast_convert_type(jnp.abs(leaf.astype(dtype)), unsigned) for leaf in leaves]
    k = jnp.asarray(k, jnp.int32)

    def count(masks: list[jax.Array]) -> jax.Array:
        return sum((jnp.sum(mask, dtype=jnp.int32) for mask in masks), jnp.int32(0))

    threshold = _largest(width, unsigned, lambda t: count([b >= t for b in bits]) >= k)
    room = k - count([b > threshold for b in bits])
    starts = list(itertools.accumulate([0, *(b.size for b in bits)]))
    size = starts.pop()

    def first_equals(end: jax.Array) -> list[jax.Array]:
        return [
            (b == threshold) & _before(end - start, b.shape)
            for b, start in zip(bits, starts, strict=True)
        ]

    end = _largest(
        size.bit_length(), jnp.dtype("int32"), lambda end: count(first_equals(end)) <= room
    )
    masks = [(b > threshold) | equal for b, equal in zip(bits, first_equals(end), strict=True)]
    return structure.unflatten(masks)


def _largest(width: int, dtype: Any, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the largest integer of `width` bits that satisfies a monotone condition."""

    def set_bit(i: jax.Array, value: jax.Array) -> jax.Array:
        bit = jnp.asarray(width - 1 - i, dtype)
        candidate = value | (jnp.ones([], dtype) << bit)
        return jnp.where(holds(candidate), candidate, value)

    # For shard_map's checks, the carry must vary over devices as the condition does.
    zero = jnp.zeros_like(holds(jnp.zeros([], dtype)), dtype=dtype)
    return jax.lax.fori_loop(0, width, set_bit, zero)


def _before(place: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns which entries of an array come before a position in row-major order."""
    rest = jnp.clip(place, 0, math.prod(shape))
    before, so_far_equal = jnp.zeros([], bool), jnp.ones([], bool)
    for axis in range(len(shape)):
        stride = max(math.prod(shape[axis + 1 :]), 1)
        coordinate, rest = rest // stride, rest % stride
        index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        before = before | (so_far_equal & (index < coordinate))
        so_far_equal = so_far_equal & (index == coordinate)
    return before | (so_far_equal & (rest > 0))
