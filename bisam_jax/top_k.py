"""The largest entries of a whole tree."""

from typing import Any

import jax
import jax.numpy as jnp

from bisam_jax._trees import at_least_float32


def size_of(tree: Any) -> int:
    """The number of entries of all leaves together."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


def top_k_mask(scores: Any, k: jax.typing.ArrayLike) -> Any:
    """A mask of the `k` largest entries of all leaves together; of equals, the first in order.

    The k-th largest score is found bit by bit, since non-negative floats are ordered as their bits
    are: each bit takes one count over the leaves where they lie, and no copy of the tree.

    Args:
        scores: a tree of non-negative floating arrays.
        k: how many, an int32 scalar, possibly traced.

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

    def count(compare: Any, threshold: jax.Array) -> jax.Array:
        return sum((jnp.sum(compare(b, threshold), dtype=jnp.int32) for b in bits), jnp.int32(0))

    def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        bit = jnp.asarray(width - 1 - i, unsigned)
        candidate = threshold | (jnp.ones([], unsigned) << bit)
        return jnp.where(count(jnp.greater_equal, candidate) >= k, candidate, threshold)

    threshold = jax.lax.fori_loop(0, width, set_bit, jnp.zeros([], unsigned))
    room = k - count(jnp.greater, threshold)
    masks = []
    for b in bits:
        equal = b == threshold
        masks.append((b > threshold) | (equal & (_rank(equal) <= room)))
        room = room - jnp.sum(equal, dtype=jnp.int32)
    return structure.unflatten(masks)


def _rank(mask: jax.Array) -> jax.Array:
    """The number of True entries up to each entry, in row-major order."""
    sharding = jax.typeof(mask).sharding
    explicit = sharding.mesh.are_all_axes_explicit
    # On a mesh with explicit axes, JAX sums along the axes of a whole array alone.
    whole = jax.sharding.reshard(mask, jax.sharding.PartitionSpec()) if explicit else mask
    rank = jnp.cumsum(whole.ravel(), dtype=jnp.int32).reshape(mask.shape)
    return jax.sharding.reshard(rank, sharding.spec) if explicit else rank
