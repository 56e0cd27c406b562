"""The Hessian of a loss, by its products with vectors: eigenvalues, trace and spectrum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._batches import Batch, BatchLossFn
from bisam_jax._checks import check_count, check_key, check_static
from bisam_jax._estimates import Estimate, check_probes, estimate_of
from bisam_jax._keys import as_key
from bisam_jax._lanczos import flattened, lanczos, matfree
from bisam_jax._products import ProductOf, hessian_product


class Eigenvalues(NamedTuple):
    """What :func:`hessian_eigenvalues` returns.

    Attributes:
        values: floating[k], the largest first.
        residuals: floating[k], :math:`\\lVert H v - \\lambda v \\rVert_2` of each.
    """

    values: jax.Array
    residuals: jax.Array


def hessian_eigenvalues(
    loss_fn: BatchLossFn,
    params: optax.Params,
    batch: Batch | list[Batch],
    k: int,
    *,
    key: jax.Array | int,
    num_matvecs: int | None = None,
    product: ProductOf = hessian_product,
    where: Any = None,
    microbatch_size: int | None = None,
) -> Eigenvalues:
    r"""Returns the largest eigenvalues of the Hessian of the mean loss, by Lanczos' method.

    Args:
        loss_fn: see :func:`hessian_product`.
        params: see :func:`hessian_product`.
        batch: see :func:`hessian_product`.
        k: number of eigenvalues, at most the number of floating parameters.
        key: a random key, or an integer seed, of the first vector.
        num_matvecs: number of products with the Hessian, at least ``k``; by default ``2 * k + 10``,
            or the number of parameters if that is less. The more, the smaller the residuals.
        product: the matrix: :func:`hessian_product` or :func:`gauss_newton_product`.
        where: leaves that take part: a tree of booleans with the structure of ``params`` or a
            prefix of it; all by default. The matrix is then the block of these leaves.
        microbatch_size: see :func:`hessian_product`.

    Returns:
        :class:`Eigenvalues`: the values, and how well each is known. An eigenvalue of the matrix
        lies within its residual. An eigenvalue that occurs several times is found once; if there
        are fewer than ``k`` different ones, the last ones are NaN.

    Raises:
        ImportError: without matfree (``pip install "bisam_jax[hessian]"``).
        TypeError, ValueError: if ``k`` or ``num_matvecs`` does not fit, or as
            :func:`hessian_product`.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=3, suppress=True)
        >>> def loss_fn(w, batch):
        ...     return 0.5 * batch @ w**2
        >>> w, batch = jnp.ones(3), jnp.array([[3.0, 1.0, 2.0]])
        >>> print(hessian_eigenvalues(loss_fn, w, batch, 2, key=0).values)
        [3. 2.]

    References:
        Lanczos, 1950, as implemented in `matfree <https://pnkraemer.github.io/matfree/>`_ with full
        reorthogonalisation

    .. note:: Keeps ``num_matvecs`` vectors of the size of the parameters, and a few more. XLA on
        CPU holds them twice.
    """
    check_key(key)
    flat, matvec = flattened(product, loss_fn, params, batch, where, microbatch_size)
    depth = min(2 * k + 10, flat.size) if num_matvecs is None else num_matvecs
    _check_sizes(k, depth, flat.size)
    start = jax.random.normal(as_key(key), flat.shape, flat.dtype)
    ritz = lanczos(matvec, start, depth)
    order = jnp.argsort(-ritz.values)[:k]  # NaN comes last
    return Eigenvalues(ritz.values[order], ritz.residuals[order])


def hessian_trace(
    loss_fn: BatchLossFn,
    params: optax.Params,
    batch: Batch | list[Batch],
    *,
    key: jax.Array | int,
    num_samples: int = 32,
    product: ProductOf = hessian_product,
    where: Any = None,
    microbatch_size: int | None = None,
) -> Estimate:
    """Returns the trace of the Hessian of the mean loss, by Hutchinson's estimator.

    Args:
        loss_fn: see :func:`hessian_product`.
        params: see :func:`hessian_product`.
        batch: see :func:`hessian_product`.
        key: a random key, or an integer seed, of the probes.
        num_samples: number of random sign vectors, at least 2.
        product: see :func:`hessian_eigenvalues`.
        where: see :func:`hessian_eigenvalues`.
        microbatch_size: see :func:`hessian_product`.

    Returns:
        :class:`Estimate`: scalars, the mean over the probes and its standard error.

    Raises:
        ImportError: without matfree (``pip install "bisam_jax[hessian]"``).
        TypeError, ValueError: if ``num_samples`` is less than 2, or as :func:`hessian_product`.

    Examples:
        >>> import jax.numpy as jnp
        >>> def loss_fn(w, batch):
        ...     return 0.5 * batch @ w**2
        >>> mean, error = hessian_trace(loss_fn, jnp.ones(2), jnp.array([[3.0, 1.0]]), key=0)
        >>> print(mean, error)
        4.0 0.0

    References:
        Hutchinson, 1989, as implemented in `matfree <https://pnkraemer.github.io/matfree/>`_
    """
    stochtrace = matfree().stochtrace
    flat, matvec = flattened(product, loss_fn, params, batch, where, microbatch_size)
    check_probes(key, num_samples)
    probe = stochtrace.sampler_signs(flat, num=1)
    one = stochtrace.monte_carlo_trace()
    keys = jax.random.split(as_key(key), num_samples)
    return estimate_of(jax.lax.map(lambda key: one(matvec, probe(key)[0]), keys))


def spectral_density(
    loss_fn: BatchLossFn,
    params: optax.Params,
    batch: Batch | list[Batch],
    *,
    grid: jax.typing.ArrayLike,
    key: jax.Array | int,
    width: jax.typing.ArrayLike | None = None,
    num_samples: int = 4,
    num_matvecs: int = 40,
    product: ProductOf = hessian_product,
    where: Any = None,
    microbatch_size: int | None = None,
) -> Estimate:
    r"""Returns the density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    Every eigenvalue is smoothed by a normal density. The integral over all real numbers is 1.

    Args:
        loss_fn: see :func:`hessian_product`.
        params: see :func:`hessian_product`.
        batch: see :func:`hessian_product`.
        grid: floating[points], where the density is returned.
        key: a random key, or an integer seed, of the probes.
        width: standard deviation of the smoothing, in the units of the eigenvalues; by default two
            hundredths of the length of the grid.
        num_samples: number of random probes, at least 2.
        num_matvecs: number of products with the Hessian per probe; at most the number of
            parameters.
        product: see :func:`hessian_eigenvalues`.
        where: see :func:`hessian_eigenvalues`.
        microbatch_size: see :func:`hessian_product`.

    Returns:
        :class:`Estimate`: floating[points], the mean over the probes and its standard error.

    Raises:
        ImportError: without matfree (``pip install "bisam_jax[hessian]"``).
        TypeError, ValueError: if a number does not fit, or as :func:`hessian_product`.

    Examples:
        >>> import jax.numpy as jnp
        >>> def loss_fn(w, batch):
        ...     return 0.5 * batch @ w**2
        >>> w, batch = jnp.ones(2), jnp.array([[3.0, 1.0]])
        >>> grid = jnp.linspace(-1.0, 5.0, 61)
        >>> density, _ = spectral_density(
        ...     loss_fn, w, batch, grid=grid, key=0, width=0.2, num_samples=64, num_matvecs=2)
        >>> print((density.sum() * 0.1).round(3))
        1.0

    References:
        Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian Eigenvalue
        Density <https://arxiv.org/abs/1901.10159>`_, 2019

    .. note:: Keeps ``num_matvecs`` vectors of the size of the parameters, and a few more. XLA on
        CPU holds them twice.
    """
    flat, matvec = flattened(product, loss_fn, params, batch, where, microbatch_size)
    check_probes(key, num_samples)
    _check_sizes(1, num_matvecs, flat.size)
    grid = jnp.asarray(grid, flat.dtype)
    if grid.ndim != 1 or grid.size < 2:
        raise ValueError(f"grid must be floating[points], two at least, got {grid.shape}.")
    width = 0.02 * (grid[-1] - grid[0]) if width is None else jnp.asarray(width, flat.dtype)

    def density(key: jax.Array) -> jax.Array:
        start = jax.random.normal(key, flat.shape, flat.dtype)
        ritz = lanczos(matvec, start, num_matvecs)
        bumps = jax.scipy.stats.norm.pdf(grid[:, None], ritz.values[None], width)
        return jnp.where(ritz.weights > 0, bumps, 0.0) @ ritz.weights

    return estimate_of(jax.lax.map(density, jax.random.split(as_key(key), num_samples)))


def _check_sizes(k: Any, depth: Any, size: int) -> None:
    for name, value in (("k", k), ("num_matvecs", depth)):
        check_static(name, value)
        check_count(name, value)
    if not k <= depth <= size:
        raise ValueError(
            f"k must be at most num_matvecs, and num_matvecs at most the {size} parameters, got "
            f"k={k} and num_matvecs={depth}."
        )
