import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import dynamic_mask, sparse_sam_dynamic
from tests.equivalences import assert_is_sam
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
def test_sparse_dynamic_on_a_quadratic(ball, eps, q, a):
    tx = sparse_sam_dynamic(**ball, sparsity=0.5, drop_rate=1.0, update_every=2)

    @jax.jit
    def step(state):
        results = (descent(tx, state, grads=grads, **q) for grads in (GRADIENT, None))
        (given, _), (computed, state) = results
        return given, computed, state

    state = optax.tree.set(tx.init(W), dynamic_mask=jnp.array([True, False]))
    for mask in ([1, 0], [0, 1]):
        *actual, state = step(state)
        np.testing.assert_allclose(actual, [gradient(W + eps(a) * mask)] * 2, rtol=1e-12)
        np.testing.assert_array_equal(optax.tree.get(state, "dynamic_mask"), [False, True])


def test_with_no_sparsity_it_is_sam():
    assert_is_sam(sparse_sam_dynamic(0.3, sparsity=0.0))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_masked_share_is_exact(sparsity):
    ones = {"a": jnp.ones((5, 9)), "b": [jnp.ones(6)]}
    tx = dynamic_mask(sparsity, drop_rate=0.3)
    update, state = jax.jit(tx.update), jax.jit(tx.init)(ones)
    assert state.dynamic_mask["a"].dtype == bool
    start = 51 - int(np.ceil(51 * sparsity))
    for _ in range(3):
        eps, state = update(ones, state, ones)
        kept = sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(eps))
        assert start - 3 <= kept <= start


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sparse_sam_dynamic(sparsity=-1.0), ValueError, "sparsity must be finite"),
        (lambda: sparse_sam_dynamic(drop_rate=2.0), ValueError, "drop_rate must be finite"),
        (
            lambda: sparse_sam_dynamic(update_every=0),
            ValueError,
            "update_every must be finite, >= 1",
        ),
        (
            lambda: descent(sparse_sam_dynamic(), drop_scores=jnp.ones(3)),
            ValueError,
            "drop_scores does not match params",
        ),
        (
            lambda: descent(sparse_sam_dynamic(), growth_scores=jnp.ones(3)),
            ValueError,
            "growth_scores does not match params",
        ),
        (
            lambda: descent(
                sparse_sam_dynamic(),
                optax.tree.set(sparse_sam_dynamic().init(W), dynamic_mask=jnp.ones(3, bool)),
            ),
            ValueError,
            "the mask in the state does not match params",
        ),
        (lambda: dynamic_mask().update(W, dynamic_mask().init(W)), ValueError, "needs the param"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_ball():
    assert_takes_one_ball(sparse_sam_dynamic)
