import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import (
    dynamic_mask,
    fisher_mask,
    fisher_scores,
    sparse_sam_dynamic,
    sparse_sam_fisher,
)
from tests.compiled import quick_jit
from tests.equivalences import assert_is_sam
from tests.problems import loss_of_batch, mlp_batch, mlp_params
from tests.quadratic import W, descent, each_ascent, gradient, unit

pytestmark = pytest.mark.usefixtures("float64")


@each_ascent
def test_sparse_fisher_on_a_quadratic(q, a):
    tx = sparse_sam_fisher(0.3, sparsity=0.5, update_every=2)

    @jax.jit
    def step(state, scores):
        return descent(tx, state, fisher_scores_fn=lambda w: scores, **q)

    grads, state = step(tx.init(W), np.array([2.0, 1.0]))
    eps = 0.3 * unit(a) * [1, 0]
    np.testing.assert_allclose(grads, gradient(W + eps), rtol=1e-12)
    other = np.array([1.0, 2.0])
    kept, state = step(state, other)
    np.testing.assert_allclose(kept, grads, rtol=1e-12)
    renewed, _ = step(state, other)
    np.testing.assert_allclose(renewed, gradient(W + 0.3 * unit(a) * [0, 1]), rtol=1e-12)


@each_ascent
def test_sparse_dynamic_on_a_quadratic(q, a):
    tx = sparse_sam_dynamic(0.3, sparsity=0.5, drop_rate=1.0, update_every=2)
    step = jax.jit(lambda state: descent(tx, state, **q))
    state = optax.tree.set(tx.init(W), dynamic_mask=jnp.array([True, False]))
    grads, state = step(state)
    np.testing.assert_allclose(grads, gradient(W + 0.3 * unit(a) * [1, 0]), rtol=1e-12)
    np.testing.assert_array_equal(optax.tree.get(state, "dynamic_mask"), [False, True])
    grads, state = step(state)
    np.testing.assert_allclose(grads, gradient(W + 0.3 * unit(a) * [0, 1]), rtol=1e-12)
    np.testing.assert_array_equal(optax.tree.get(state, "dynamic_mask"), [False, True])


@pytest.mark.parametrize("make", [sparse_sam_fisher, sparse_sam_dynamic])
def test_with_no_sparsity_it_is_sam(make):
    assert_is_sam(make(0.3, sparsity=0.0))


def test_fisher_scores_are_sums_of_squared_gradients():
    params, batch = mlp_params(), mlp_batch()

    @jax.jit
    def square(example):
        return jax.tree.map(jnp.square, jax.grad(loss_of_batch)(params, example))

    expected = [square(jax.tree.map(lambda x, i=i: x[i : i + 1], batch)) for i in range(16)]
    expected = jax.tree.map(lambda *leaves: sum(leaves), *expected)
    scores = functools.partial(fisher_scores, loss_of_batch)
    for size in (1, 4):
        actual = jax.jit(functools.partial(scores, microbatch_size=size))(params, batch)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_masked_share_is_exact(sparsity):
    ones = {"a": jnp.ones((5, 9)), "b": [jnp.ones(6)]}
    n = 51

    def masked_share(eps):
        return sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(eps))

    tx = fisher_mask(sparsity)
    update = quick_jit(functools.partial(tx.update, fisher_scores_fn=lambda p: p))
    eps, _ = update(ones, tx.init(ones), ones)
    assert masked_share(eps) == int(n * (1 - sparsity))
    tx = dynamic_mask(sparsity, drop_rate=0.3)
    update, state = quick_jit(tx.update), quick_jit(tx.init)(ones)
    assert state.dynamic_mask["a"].dtype == bool
    start = n - int(np.ceil(n * sparsity))
    for _ in range(3):
        eps, state = update(ones, state, ones)
        assert start - 3 <= masked_share(eps) <= start


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: sparse_sam_fisher(sparsity=1.5),
            ValueError,
            "sparsity must be finite, >= 0, <= 1",
        ),
        (lambda: sparse_sam_dynamic(sparsity=-1.0), ValueError, "sparsity must be finite"),
        (lambda: sparse_sam_dynamic(drop_rate=2.0), ValueError, "drop_rate must be finite"),
        (
            lambda: sparse_sam_fisher(update_every=0),
            ValueError,
            "update_every must be finite, >= 1",
        ),
        (lambda: descent(sparse_sam_fisher()), ValueError, "fisher_scores_fn is missing"),
        (
            lambda: descent(sparse_sam_fisher(), fisher_scores_fn=lambda w: w[:1]),
            ValueError,
            "what fisher_scores_fn returned does not match params",
        ),
        (
            lambda: descent(sparse_sam_dynamic(), drop_scores=jnp.ones(3)),
            ValueError,
            "drop_scores does not match params",
        ),
        (
            lambda: descent(
                sparse_sam_dynamic(),
                optax.tree.set(sparse_sam_dynamic().init(W), dynamic_mask=jnp.ones(3, bool)),
            ),
            ValueError,
            "the mask in the state does not match params",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
