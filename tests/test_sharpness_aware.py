"""Closed forms on quadratics, where every sign, radius and norm can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import adaptive_l2_ball, asam, bisam, l2_ball, sam, sharpness_aware
from tests.quadratic import A, B, C, W, gradient, linear, quadratic

GRADIENT = gradient(W)

pytestmark = pytest.mark.usefixtures("float64")


def descent(tx, **extra_args):
    return tx.update(jnp.asarray(GRADIENT), tx.init(W), jnp.asarray(W), **extra_args)[0]


def test_sam_on_a_quadratic():
    expected = A @ (W + 0.3 * GRADIENT / np.linalg.norm(GRADIENT)) - B
    actual = descent(sam(0.3), loss_fn=quadratic)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_bisam_on_a_quadratic():
    expected = A @ (W + 0.3 * C / 13) - B
    actual = descent(bisam(0.3), loss_fn=quadratic, perturbation_loss_fn=linear)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("g", [GRADIENT, C], ids=["sam", "bisam"])
def test_asam_on_a_quadratic(g):
    size = np.abs(W) + 0.1
    expected = A @ (W + 0.3 * size**2 * g / np.linalg.norm(size * g)) - B
    q = {"perturbation_loss_fn": linear} if g is C else {}
    np.testing.assert_allclose(
        descent(asam(0.3, eta=0.1), loss_fn=quadratic, **q), expected, rtol=1e-12
    )


def test_perturbation_raises_what_is_ascended():
    seen = []
    tx = bisam(0.1)
    descent(tx, grad_fn=lambda w: (seen.append(w), w)[1], perturbation_loss_fn=linear)
    # On a linear function the rise is exactly rho times the norm of its gradient.
    np.testing.assert_allclose(linear(seen[0]) - linear(W), 0.1 * 13, rtol=1e-12)


def test_steps_of_a_schedule():
    tx = sam(lambda count: jnp.where(count < 1, 0.2, 0.4))
    state = tx.init(W)
    for rho in (0.2, 0.4, 0.4):
        grads, state = tx.update(jnp.asarray(GRADIENT), state, jnp.asarray(W), loss_fn=quadratic)
        expected = A @ (W + rho * GRADIENT / np.linalg.norm(GRADIENT)) - B
        np.testing.assert_allclose(grads, expected, rtol=1e-12)


def test_freeze_perturbs_only_some_leaves():
    def loss_fn(p):
        return quadratic(jnp.stack([p["x"], p["y"]]))

    params = {"x": jnp.asarray(W[0]), "y": jnp.asarray(W[1])}
    pipeline = optax.chain(optax.transforms.freeze({"x": True, "y": False}), l2_ball(0.3))
    tx = sharpness_aware(pipeline)
    grads, _ = tx.update(jax.grad(loss_fn)(params), tx.init(params), params, loss_fn=loss_fn)
    expected = A @ (W + np.array([0, 0.3 * np.sign(GRADIENT[1])])) - B
    np.testing.assert_allclose([grads["x"], grads["y"]], expected, rtol=1e-12)


def test_extra_args_reach_the_perturbation():
    def update_fn(updates, state, params=None, *, temperature, **extra_args):
        assert "loss_fn" not in extra_args
        return jax.tree.map(lambda g: temperature * g, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    expected = A @ (W + 0.5 * GRADIENT) - B
    for perturbation in (scaled, optax.chain(optax.identity(), scaled)):
        actual = descent(sharpness_aware(perturbation), loss_fn=quadratic, temperature=0.5)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_perturbation_that_does_not_match_is_named():
    broken = optax.stateless(lambda updates, params: {"other": updates})
    with pytest.raises(ValueError, match="the perturbation does not match params"):
        descent(sharpness_aware(broken), loss_fn=quadratic)


@pytest.mark.parametrize("perturbation", [0.05, l2_ball, None])
def test_perturbation_must_be_a_transformation(perturbation):
    with pytest.raises(TypeError, match="perturbation must be an optax transformation"):
        sharpness_aware(perturbation)


def test_missing_grads_are_zero_at_leaves_that_are_not_floating():
    params = {"w": jnp.asarray(W), "i": jnp.arange(2)}
    tx = bisam(0.3)
    grads, _ = tx.update(
        None,
        tx.init(params),
        params,
        loss_fn=lambda p: quadratic(p["w"]),
        perturbation_loss_fn=lambda p: linear(p["w"]),
    )
    np.testing.assert_array_equal(grads["i"], [0, 0])
    np.testing.assert_allclose(grads["w"], A @ (W + 0.3 * C / 13) - B, rtol=1e-12)


def test_numpy_parameters_of_double_precision():
    with jax.enable_x64(False):
        grads, _ = sam(0.3).update(GRADIENT, sam(0.3).init(W), W, loss_fn=lambda w: jnp.sum(w**2))
        assert grads.dtype == jnp.float32


def test_grads_are_not_looked_at_when_the_perturbation_loss_is_given():
    tx = bisam(0.3)
    expected = descent(tx, loss_fn=quadratic, perturbation_loss_fn=linear)
    nan = jnp.full(2, jnp.nan)
    without, _ = tx.update(
        None, tx.init(W), jnp.asarray(W), loss_fn=quadratic, perturbation_loss_fn=linear
    )
    np.testing.assert_array_equal(without, expected)
    actual, _ = tx.update(
        nan, tx.init(W), jnp.asarray(W), loss_fn=quadratic, perturbation_loss_fn=linear
    )
    np.testing.assert_array_equal(actual, expected)


def test_adaptive_scales_follow_the_current_parameters():
    tx = sharpness_aware(adaptive_l2_ball(0.3, eta=0.0))
    moved = jnp.asarray(2 * W)
    g = gradient(2 * W)
    size = 2 * np.abs(W)
    expected = A @ (2 * W + 0.3 * size**2 * g / np.linalg.norm(size * g)) - B
    actual, _ = tx.update(jnp.asarray(g), tx.init(W), moved, loss_fn=quadratic)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
