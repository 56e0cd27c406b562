"""Eigenvalues, trace and spectrum, against dense matrices."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from bisam_jax import (
    gauss_newton_product,
    hessian_eigenvalues,
    hessian_product,
    hessian_trace,
    logits_loss,
    spectral_density,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def network(dtype=jnp.float64):
    """A perceptron of 195 parameters, and a batch."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w": jax.random.normal(keys[0], (8, 16), dtype) / 3,
        "b": 0.1 * jax.random.normal(keys[1], (16,), dtype),
        "v": jax.random.normal(keys[2], (16, 3), dtype) / 4,
        "c": jnp.zeros(3, dtype),
    }
    x = jax.random.normal(keys[3], (24, 8), dtype)
    return params, {"x": x, "y": jnp.arange(24) % 3}


def logits_of(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    return hidden @ params["v"] + params["c"][None]


def cross_entropy(logits, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


loss_fn = logits_loss(logits_of, cross_entropy)


def in_one_program(measure, loss, params, batch, *rest, **options):
    """Calls `measure`, compiled whole: operation by operation, it takes many times as long."""
    return jax.jit(lambda p, b: measure(loss, p, b, *rest, **options))(params, batch)


eigenvalues = functools.partial(in_one_program, hessian_eigenvalues)
trace = functools.partial(in_one_program, hessian_trace)


def dense(params, batch, product=hessian_product):
    """The matrix, from jax.hessian or from Jacobians."""
    return jax.jit(functools.partial(_dense, product=product))(params, batch)


def _dense(params, batch, product):
    flat, unravel = ravel_pytree(params)
    if product is hessian_product:
        return jax.hessian(lambda v: loss_fn(unravel(v), batch).mean())(flat)
    jacobian = jax.jacobian(lambda v: logits_of(unravel(v), batch))(flat)
    logits = logits_of(params, batch)
    of_one = jax.hessian(lambda z, y: optax.losses.softmax_cross_entropy_with_integer_labels(z, y))
    blocks = jax.vmap(of_one)(logits, batch["y"]) / len(logits)
    return jnp.einsum("bip,bij,bjq->pq", jacobian, blocks, jacobian)


@pytest.mark.parametrize("product", [hessian_product, gauss_newton_product])
def test_a_network_against_its_dense_matrix(product, float64):
    params, batch = network()
    matrix = dense(params, batch, product)
    assert len(matrix) == 195
    vector = jax.random.normal(jax.random.key(5), (len(matrix),), jnp.float64)
    _, unravel = ravel_pytree(params)
    applied = ravel_pytree(product(loss_fn, params, batch)(unravel(vector)))[0]
    np.testing.assert_allclose(applied, matrix @ vector, rtol=1e-9, atol=1e-12)

    exact = jnp.linalg.eigvalsh(matrix)[::-1]
    found = eigenvalues(loss_fn, params, batch, 5, key=0, num_matvecs=90, product=product)
    np.testing.assert_allclose(found.values, exact[:5], atol=1e-6)
    assert (found.residuals < 1e-6).all()

    mean, error = trace(loss_fn, params, batch, key=1, num_samples=400, product=product)
    assert abs(mean - jnp.trace(matrix)) < 4 * error
    assert 0 < error < 0.2 * abs(jnp.trace(matrix))


def test_repeated_eigenvalues_are_found_once(float64):
    def quadratic(w, batch):
        return 0.5 * batch @ (jnp.array([2.0, 2.0, 2.0, 1.0]) * w**2)

    w, batch = jnp.ones(4), jnp.ones((2, 4))
    found = eigenvalues(quadratic, w, batch, 3, key=0)
    np.testing.assert_allclose(found.values, [2.0, 1.0, np.nan], atol=1e-9)
    assert (found.residuals[:2] < 1e-9).all()
    flat = hessian_eigenvalues(lambda w, b: b @ w, w, batch, 1, key=0)
    np.testing.assert_allclose(flat.values, [0.0], atol=1e-12)


def test_residuals_are_honest(float64):
    """An eigenvalue of the matrix lies within the residual of each value, however few products."""
    params, batch = network()
    exact = jnp.linalg.eigvalsh(dense(params, batch))
    for depth in (4, 8, 16, 32):
        found = eigenvalues(loss_fn, params, batch, 4, key=3, num_matvecs=depth)
        distance = jnp.abs(found.values[:, None] - exact[None]).min(1)
        assert (distance <= found.residuals + 1e-12).all()
        assert (np.diff(found.values) <= 0).all()


def test_a_quadratic_of_known_spectrum(float64):
    diagonal = jnp.array([9.0, 4.0, 4.0, 1.0, 0.0, -2.0])

    def quadratic(w, batch):
        return 0.5 * batch @ (diagonal * w**2)

    w, batch = jnp.ones(6), jnp.ones((2, 6))
    found = eigenvalues(quadratic, w, batch, 3, key=0, num_matvecs=5)
    np.testing.assert_allclose(found.values, [9.0, 4.0, 1.0], atol=1e-8)
    mean, error = trace(quadratic, w, batch, key=0)
    np.testing.assert_allclose((mean, error), (16.0, 0.0), atol=1e-12)

    grid = jnp.linspace(-5.0, 12.0, 341)
    options = {"grid": grid, "width": 0.3, "num_samples": 3000, "num_matvecs": 5}
    density, error = spectral_density(quadratic, w, batch, key=2, **options)
    bumps = jax.scipy.stats.norm.pdf(grid[:, None], diagonal[None], 0.3).mean(1)
    assert (jnp.abs(density - bumps) <= 5 * error + 1e-6).all()
    np.testing.assert_allclose(density.sum() * (grid[1] - grid[0]), 1.0, rtol=1e-3)


@pytest.mark.slow
def test_a_mask_gives_the_block_of_its_leaves(float64):
    params, batch = network()
    where = {"w": False, "b": True, "v": True, "c": False}
    flat, unravel = ravel_pytree({"b": params["b"], "v": params["v"]})
    block = jax.hessian(lambda v: loss_fn({**params, **unravel(v)}, batch).mean())(flat)
    exact = jnp.linalg.eigvalsh(block)[::-1]
    found = eigenvalues(loss_fn, params, batch, 3, key=0, num_matvecs=50, where=where)
    np.testing.assert_allclose(found.values, exact[:3], atol=1e-6)
    mean, error = trace(loss_fn, params, batch, key=0, num_samples=400, where=where)
    assert abs(mean - jnp.trace(block)) < 4 * error


def test_batches_microbatches_and_seeds(float64):
    params, batch = network()

    def top(params, batch, **options):
        found = hessian_eigenvalues(loss_fn, params, batch, 2, key=0, num_matvecs=25, **options)
        return found.values

    whole = jax.jit(top)(params, batch)
    microbatched = jax.jit(functools.partial(top, microbatch_size=8))(params, batch)
    np.testing.assert_allclose(microbatched, whole, rtol=1e-8)
    parts = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 5), slice(5, 24))]
    np.testing.assert_allclose(jax.jit(top)(params, parts), whole, rtol=1e-8)
    seeds = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), params)
    mapped = jax.jit(jax.vmap(top, (0, None)))(seeds, batch)
    np.testing.assert_allclose(mapped[0], whole, rtol=1e-8)
    second = jax.jit(top)(jax.tree.map(lambda x: x[1], seeds), batch)
    np.testing.assert_allclose(mapped[1], second, rtol=1e-8)


@pytest.mark.slow
def test_leaves_that_are_not_floating_take_no_part():
    params, batch = network(jnp.float32)
    mixed = {**params, "n": jnp.arange(4), "none": None}
    found, alone = (
        hessian_eigenvalues(loss_fn, given, batch, 2, key=0).values for given in (mixed, params)
    )
    np.testing.assert_allclose(found, alone, rtol=1e-3)


def test_memory_is_that_of_the_vectors():
    """One vector of the size of the parameters for each product, and a few more."""

    def loss(w, batch):
        return jnp.mean(batch) * jnp.sum(w**2) + jnp.sum(w) ** 2

    w, batch = jnp.ones(200_000), jnp.ones((2, 1))

    def temporary(depth):
        def found(w):
            return hessian_eigenvalues(loss, w, batch, 1, key=0, num_matvecs=depth)

        return jax.jit(found).lower(w).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(4), temporary(12)
    size = w.size * 4
    # XLA on CPU holds each vector twice.
    assert many - few <= 16.5 * size
    assert few <= (2 * 4 + 4) * size


def test_without_matfree(monkeypatch):
    params, batch = network(jnp.float32)
    monkeypatch.setitem(sys.modules, "matfree", None)
    monkeypatch.setitem(sys.modules, "matfree.decomp", None)
    with pytest.raises(ImportError, match=r'pip install "bisam_jax\[hessian\]"'):
        hessian_eigenvalues(loss_fn, params, batch, 1, key=0)


@pytest.mark.parametrize(
    ("call", "options", "error", "message"),
    [
        (hessian_eigenvalues, {"k": 0}, ValueError, "k must be"),
        (hessian_eigenvalues, {"k": 500}, ValueError, "k must be at most num_matvecs"),
        (hessian_eigenvalues, {"k": 3, "num_matvecs": 2}, ValueError, "got k=3 and num_matvecs=2"),
        (hessian_eigenvalues, {"k": 1, "where": {"w": True}}, ValueError, "where must be a tree"),
        (hessian_eigenvalues, {"k": 1, "where": False}, ValueError, "there are no parameters"),
        (hessian_trace, {"num_samples": 1}, ValueError, "num_samples must be at least 2"),
        (hessian_trace, {"key": "a"}, TypeError, "key must be one random key"),
        (spectral_density, {"grid": 1.0}, ValueError, "grid must be"),
    ],
)
def test_wrong_use(call, options, error, message):
    params, batch = network(jnp.float32)
    with pytest.raises(error, match=message):
        call(loss_fn, params, batch, **{"key": 0, **options})


def test_the_gauss_newton_matrix_needs_a_split_loss():
    params, batch = network(jnp.float32)
    with pytest.raises(TypeError, match=r"pass bisam_jax\.logits_loss"):
        gauss_newton_product(lambda p, b: loss_fn(p, b), params, batch)
