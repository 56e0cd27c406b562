"""Lanczos' method on trees of parameters, by matfree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bisam_jax._batches import BatchLossFn
from bisam_jax._products import ProductOf
from bisam_jax._trees import float_part, spread


class Ritz(NamedTuple):
    """Eigenvalues found by Lanczos' method; NaN for those beyond what the start can reach.

    Attributes:
        values: floating[depth].
        residuals: floating[depth].
        weights: floating[depth], the share of the start in each eigenvector.
    """

    values: jax.Array
    residuals: jax.Array
    weights: jax.Array


def lanczos(matvec: Callable[[jax.Array], jax.Array], start: jax.Array, depth: int) -> Ritz:
    """Returns what `depth` products with a symmetric matrix find."""
    tridiagonalise = matfree().decomp.tridiag_sym(depth, reortho="full", custom_vjp=False)
    decomposition = tridiagonalise(matvec, start)
    matrix, one = decomposition.J_small, jnp.ones(1, bool)
    entries = jnp.where(jnp.isfinite(matrix), jnp.abs(matrix), 0)
    tiny = 100 * jnp.finfo(matrix.dtype).eps * entries.max()
    # Once all of the matrix that the start can reach is found, what follows is rounding or NaN.
    found = jnp.concatenate([one, jnp.cumprod(jnp.diagonal(matrix, 1) > tiny) > 0])
    both = found[:, None] & found[None]
    outside = -3 * entries.max() - 1
    matrix = jnp.where(both, matrix, 0) + jnp.diag(jnp.where(found, 0, outside))
    values, vectors = jnp.linalg.eigh(matrix)
    is_found = (jnp.where(found[:, None], vectors, 0) ** 2).sum(0) > 0.5
    last = jnp.where(found.all(), jnp.linalg.norm(decomposition.residual), tiny)
    residuals = last * jnp.abs(vectors[found.sum() - 1])
    nan = jnp.asarray(jnp.nan, values.dtype)
    return Ritz(
        jnp.where(is_found, values, nan),
        jnp.where(is_found, residuals, nan),
        jnp.where(is_found, vectors[0] ** 2, 0),
    )


def matfree() -> Any:
    """Returns the package, or says how to install it."""
    try:
        import matfree
        import matfree.decomp
        import matfree.stochtrace
    except ImportError as error:
        raise ImportError(
            'matfree is needed for the Hessian: pip install "bisam_jax[hessian]"'
        ) from error
    return matfree


def flattened(
    product: ProductOf,
    loss_fn: BatchLossFn,
    params: optax.Params,
    batch: Any,
    where: Any,
    microbatch_size: int | None,
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns the chosen leaves as one vector, and the product for such vectors."""
    floats = float_part(params)
    leaves, tree = jax.tree.flatten(floats)
    used = jax.tree.leaves(spread(True if where is None else where, floats))
    flat, unravel = ravel_pytree([leaf for leaf, use in zip(leaves, used, strict=True) if use])
    if not flat.size:
        raise ValueError("there are no parameters: where must choose a floating leaf at least.")
    whole = product(loss_fn, params, batch, microbatch_size=microbatch_size)

    def matvec(vector: jax.Array) -> jax.Array:
        parts = iter(unravel(vector))
        full = [
            next(parts) if use else jnp.zeros_like(leaf)
            for leaf, use in zip(leaves, used, strict=True)
        ]
        result = jax.tree.leaves(whole(jax.tree.unflatten(tree, full)))
        return ravel_pytree([leaf for leaf, use in zip(result, used, strict=True) if use])[0]

    return flat, matvec
