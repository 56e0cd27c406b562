import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bisam_jax import adaptive_l2_ball, sam, tilted_sam
from tests.equivalences import assert_is_sam
from tests.quadratic import (
    GRADIENT,
    C,
    W,
    adaptive_eps,
    assert_takes_one_ball,
    descent,
    gradient,
    quadratic,
    unit,
)

pytestmark = pytest.mark.usefixtures("float64")


def cubic(w):
    """Q, with another gradient at each start."""
    return jnp.sum(w**3)


each_function = pytest.mark.parametrize("q", [None, cubic], ids=["sam", "bisam"])
NOISE = np.array([[0.3, -0.4], [3.0, 4.0], [0.0, 0.1]])


@functools.partial(jax.jit, static_argnames=("tx", "q"))
def with_and_without_grads(tx, tilt, q):
    return [
        descent(tx(tilt), grads=grads, noise=NOISE, perturbation_loss_fn=q)[0]
        for grads in (GRADIENT, None)
    ]


def expected_descent(tilt, q, eps):
    losses, grads = [], []
    for noise in NOISE:
        noise = 0.5 * noise * min(1, 1.0 / (0.5 * np.linalg.norm(noise)))
        start = W + noise
        point = start + eps(3 * start**2 if q else gradient(start), start)
        losses.append(float(quadratic(point)))
        grads.append(gradient(point))
    weights = np.exp(tilt * np.array(losses))
    return weights @ np.array(grads) / weights.sum()


def in_a_ball(tilt, together):
    return tilted_sam(0.2, tilt, 3, radius=1.0, scale=0.5, together=together)


TOGETHER = functools.partial(in_a_ball, together=True)
ONE_BY_ONE = functools.partial(in_a_ball, together=False)


@pytest.mark.parametrize("tilt", [0.0, 2.0, -1.0])
@pytest.mark.parametrize("tx", [ONE_BY_ONE, TOGETHER], ids=["one by one", "together"])
@each_function
def test_tilted_on_a_quadratic(q, tx, tilt):
    expected = expected_descent(tilt, q, lambda a, start: 0.2 * unit(a))
    actual = with_and_without_grads(tx, tilt, q)
    np.testing.assert_allclose(actual, [expected] * 2, rtol=1e-12)


def in_an_adaptive_ball(tilt):
    ball = adaptive_l2_ball(0.3, eta=0.1)
    return tilted_sam(tilt=tilt, radius=1.0, scale=0.5, perturbation=ball)


@each_function
def test_adaptive_tilted_on_a_quadratic(q):
    """Each start has a ball of a different size."""
    expected = expected_descent(2.0, q, adaptive_eps)
    actual = with_and_without_grads(in_an_adaptive_ball, 2.0, q)
    np.testing.assert_allclose(actual, [expected] * 2, rtol=1e-12)


def test_tilted_limits():
    plain, _ = descent(sam(0.2))
    one, _ = jax.jit(lambda: descent(tilted_sam(0.2, num_samples=1, radius=0.0)))()
    np.testing.assert_allclose(one, plain, rtol=1e-12)
    z = np.array([[0.3, -0.4], [0.3, 0.1]])
    alone_of = jax.jit(lambda noise: descent(tilted_sam(0.2, 1.0, 1), noise=noise)[0])
    alone = [alone_of(z[i : i + 1]) for i in (0, 1)]
    worst = int(np.argmax([quadratic(w + 0.2 * unit(gradient(w))) for w in W + z]))
    for together in (False, True):
        tx = tilted_sam(0.2, 1e4, 2, together=together)
        large, _ = jax.jit(lambda tx=tx: descent(tx, noise=jnp.asarray(z)))()
        np.testing.assert_allclose(large, alone[worst], rtol=1e-9)


def test_tilted_draws_are_new_each_step_and_can_be_replayed():
    tx = tilted_sam(0.2, key=jax.random.key(5))
    state = tx.init(W)
    step = jax.jit(lambda state: descent(tx, state))
    first, next_state = step(state)
    again, _ = step(state)
    second, _ = step(next_state)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3


def test_tilted_noise_is_normal_and_no_longer_than_the_radius():
    # The gradient of |w|^2 / 2 is the point itself: with rho = 0, the noise.
    params = jnp.zeros(2000)

    @jax.jit
    def noise(radius):
        tx = tilted_sam(0.0, num_samples=1, radius=radius, scale=0.5)
        return tx.update(params, tx.init(params), params, loss_fn=lambda w: jnp.sum(w**2) / 2)[0]

    np.testing.assert_allclose(np.linalg.norm(noise(0.25)), 0.25, rtol=1e-9)
    grads = noise(1e9)
    assert np.std(grads) == pytest.approx(0.5, rel=0.05)
    assert abs(np.mean(grads)) < 0.05


@pytest.mark.parametrize(
    "tx",
    [
        tilted_sam(0.3, num_samples=1, radius=0.0),
        tilted_sam(0.3, num_samples=3, scale=0.0, together=True),
    ],
    ids=["one", "together"],
)
def test_without_noise_it_is_sam(tx):
    assert_is_sam(tx)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tilted_sam(num_samples=0), ValueError, "num_samples must be finite, >= 1, got 0"),
        (lambda: tilted_sam(num_samples=1.5), TypeError, "num_samples must be an integer"),
        (lambda: tilted_sam(radius=-1.0), ValueError, "radius must be finite, >= 0"),
        (
            lambda: descent(tilted_sam(), loss_fn=None),
            ValueError,
            "exactly one of loss_fn .* got neither",
        ),
        (
            lambda: descent(tilted_sam(), noise=jnp.ones((2, 2))),
            ValueError,
            r"noise, which needs a leading axis of num_samples, does not match .* \(2, 2\)",
        ),
        (
            lambda: descent(tilted_sam(), loss_fn=None, grad_fn=gradient),
            ValueError,
            "loss_fn is missing, and the method weights gradients by losses",
        ),
        (
            lambda: descent(tilted_sam(), perturbation_grads=C),
            ValueError,
            "perturbation_grads is valid only at params, and the method ascends Q elsewhere",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_ball():
    assert_takes_one_ball(tilted_sam)
