"""The arrays of a state: their names, descriptions and hashes, and whether they are finite."""

import re
from typing import Any

import jax
import jax.numpy as jnp


def by_name(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by names like "blocks.0.kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name_of(jax.tree_util.keystr(path)): leaf for path, leaf in leaves}


def name_of(path: str) -> str:
    """Returns such a name of a path as JAX writes it."""
    return ".".join(re.findall(r"\w+", path))


def all_finite(state: Any) -> bool:
    """Returns whether no floating number of a state is infinite or NaN."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return bool(_all_finite(floats))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def described(tree: Any, sums: dict[str, int]) -> dict[str, list[Any]]:
    """Returns hash, shape and dtype of each array by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    paths = ((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
    return {path: [sums.get(path), list(leaf.shape), str(leaf.dtype)] for path, leaf in paths}


def shape_in_words(description: list[Any] | None) -> str:
    """Returns the dtype and the shape of a description."""
    return "missing" if description is None else f"{description[2]}{description[1]}"


def hashes_of(tree: Any) -> dict[str, int]:
    """Returns a hash of the bits of each array, the same for any layout over devices."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = _sums_of_bits([leaf for _, leaf in leaves])
    return {
        jax.tree_util.keystr(path): int(sum_) for (path, _), sum_ in zip(leaves, sums, strict=True)
    }


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> list[jax.Array]:
    def sum_of_bits(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = jax.lax.bitcast_convert_type(leaf, f"uint{jnp.finfo(leaf.dtype).bits}")
        bits = leaf.astype(jnp.uint32).ravel()
        # Odd weights keep every bit. Different weights detect swapped values.
        weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        return (bits * weights).sum(dtype=jnp.uint32)

    return [sum_of_bits(leaf) for leaf in leaves]
