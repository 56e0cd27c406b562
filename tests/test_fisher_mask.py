import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bisam_jax import fisher_mask, fisher_scores, sparse_sam_fisher
from tests.equivalences import assert_is_sam
from tests.problems import loss_of_batch, mlp_batch, mlp_params
from tests.quadratic import (
    GRADIENT,
    W,
    assert_takes_one_ball,
    descent,
    each_ascent,
    each_ball,
    gradient,
)

pytestmark = pytest.mark.usefixtures("float64")


@each_ball
@each_ascent
def test_sparse_fisher_on_a_quadratic(ball, eps, q, a):
    tx = sparse_sam_fisher(**ball, sparsity=0.5, update_every=2)

    @jax.jit
    def step(state, scores):
        results = (
            descent(tx, state, grads=grads, fisher_scores_fn=lambda w: scores, **q)
            for grads in (GRADIENT, None)
        )
        (given, _), (computed, state) = results
        return given, computed, state

    *actual, state = step(tx.init(W), np.array([2.0, 1.0]))
    expected = gradient(W + eps(a) * [1, 0])
    np.testing.assert_allclose(actual, [expected] * 2, rtol=1e-12)
    other = np.array([1.0, 2.0])
    *kept, state = step(state, other)
    np.testing.assert_allclose(kept, actual, rtol=1e-12)
    *renewed, _ = step(state, other)
    np.testing.assert_allclose(renewed, [gradient(W + eps(a) * [0, 1])] * 2, rtol=1e-12)


def test_with_no_sparsity_it_is_sam():
    assert_is_sam(sparse_sam_fisher(0.3, sparsity=0.0))


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
    tx = fisher_mask(sparsity)
    update = jax.jit(functools.partial(tx.update, fisher_scores_fn=lambda p: p))
    eps, _ = update(ones, tx.init(ones), ones)
    kept = sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(eps))
    assert kept == int(51 * (1 - sparsity))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: sparse_sam_fisher(sparsity=1.5),
            ValueError,
            "sparsity must be finite, >= 0, <= 1",
        ),
        (
            lambda: sparse_sam_fisher(update_every=0),
            ValueError,
            "update_every must be finite, >= 1",
        ),
        (lambda: descent(sparse_sam_fisher()), ValueError, "fisher_scores_fn is missing"),
        (
            lambda: descent(sparse_sam_fisher(), fisher_scores_fn=lambda w: w[:1]),
            ValueError,
            "the output of fisher_scores_fn does not match params",
        ),
        (
            lambda: fisher_mask().update(W, fisher_mask().init(W), fisher_scores_fn=lambda w: w),
            ValueError,
            "params is missing",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_ball():
    assert_takes_one_ball(sparse_sam_fisher)


def test_scores_of_narrow_parameters_are_taken_in_float32():
    params = {"w": jnp.array([1e-3, 2e-3], jnp.float16), "count": jnp.array(3)}
    x = jnp.ones((4, 2), jnp.float32)

    def loss_fn(params, x):
        return jnp.mean(jnp.square(x @ params["w"]) * 1e-2)

    scores = fisher_scores(loss_fn, params, x)
    # 4 examples, each with the gradient 2 * 1e-2 * (1e-3 + 2e-3).
    np.testing.assert_allclose(scores["w"], [4 * 6e-5**2] * 2, rtol=2e-3)
    assert scores["w"].dtype == jnp.float32
    assert scores["count"] is None
