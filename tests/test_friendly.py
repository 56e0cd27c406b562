import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import friendly, friendly_sam
from tests.equivalences import assert_is_sam
from tests.quadratic import (
    W,
    assert_takes_one_ball,
    descent,
    each_ascent,
    each_ball,
    each_grads,
    gradient,
)

pytestmark = pytest.mark.usefixtures("float64")


@each_ball
@each_ascent
@each_grads
def test_friendly_on_a_quadratic(ball, eps, q, a, grads):
    tx = friendly_sam(**ball, sigma=0.5, decay=0.8)
    actual, state = descent(tx, grads=grads, **q)
    np.testing.assert_allclose(actual, gradient(W + eps(a)), rtol=1e-12)
    other = np.array([1.0, 7.0])
    mean = a
    actual, state = descent(tx, state, grads=other)
    np.testing.assert_allclose(actual, gradient(W + eps(other - 0.5 * mean)), rtol=1e-12)
    expected = 0.8 * a + 0.2 * other
    np.testing.assert_allclose(optax.tree.get(state, "mean_gradient"), expected, rtol=1e-12)


def test_with_nothing_taken_away_it_is_sam():
    assert_is_sam(friendly_sam(0.3, sigma=0.0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: friendly(decay=1.5), ValueError, "decay must be finite, >= 0, <= 1"),
        (lambda: friendly(sigma=-1.0), ValueError, "sigma must be finite, >= 0"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_ball():
    assert_takes_one_ball(friendly_sam)


@pytest.mark.usefixtures("float64")
def test_gradients_of_another_dtype_leave_the_state_as_it_is():
    params = jnp.asarray(W, jnp.float32)
    tx = friendly_sam(0.1)
    state = tx.init(params)
    grads = {"perturbation_grads": jnp.asarray(W, jnp.float64)}
    _, new_state = tx.update(None, state, params, loss_fn=lambda w: jnp.sum(w**2), **grads)
    chex.assert_trees_all_equal_dtypes(state, new_state)
