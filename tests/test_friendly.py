import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import friendly, friendly_sam
from tests.equivalences import assert_bilevel_through_value_and_grad, assert_is_sam, each_size
from tests.quadratic import W, descent, each_ascent, gradient, quadratic, unit

pytestmark = pytest.mark.usefixtures("float64")


@each_ascent
def test_friendly_on_a_quadratic(q, a):
    tx = friendly_sam(0.3, sigma=0.5, decay=0.8)
    grads, state = descent(tx, **q)
    np.testing.assert_allclose(grads, gradient(W + 0.3 * unit(a)), rtol=1e-12)
    other = np.array([1.0, 7.0])
    mean = a
    grads, state = tx.update(jnp.asarray(other), state, jnp.asarray(W), loss_fn=quadratic)
    expected = gradient(W + 0.3 * unit(other - 0.5 * mean))
    np.testing.assert_allclose(grads, expected, rtol=1e-12)
    expected = 0.8 * a + 0.2 * other
    np.testing.assert_allclose(optax.tree.get(state, "mean_gradient"), expected, rtol=1e-12)


def test_with_nothing_taken_away_it_is_sam():
    assert_is_sam(friendly_sam(0.3, sigma=0.0))


FRIENDLY = friendly_sam(0.3)


@each_size
def test_bilevel_through_value_and_grad(sizes):
    assert_bilevel_through_value_and_grad(FRIENDLY, sizes)


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
