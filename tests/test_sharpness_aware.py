"""Closed forms on quadratics, where every sign, radius and norm can be computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import adaptive_l2_ball, asam, bisam, l2_ball, sam, sharpness_aware
from tests import quadratic as problem
from tests.quadratic import (
    GRADIENT,
    A,
    B,
    C,
    W,
    adaptive_eps,
    each_ascent,
    each_grads,
    gradient,
    l2_eps,
    linear,
    quadratic,
)

pytestmark = pytest.mark.usefixtures("float64")


def descent(tx, **arguments):
    return problem.descent(tx, **arguments)[0]


@pytest.mark.parametrize(
    ("tx", "eps"),
    [
        (sam(0.3), l2_eps),
        (sharpness_aware(l2_ball(0.3)), l2_eps),
        (asam(0.3, eta=0.1), adaptive_eps),
        (sharpness_aware(adaptive_l2_ball(0.3, eta=0.1)), adaptive_eps),
    ],
    ids=["sam", "in an l2 ball", "asam", "in an adaptive ball"],
)
@each_ascent
@each_grads
def test_on_a_quadratic(tx, eps, q, a, grads):
    expected = A @ (W + eps(a)) - B
    np.testing.assert_allclose(descent(tx, grads=grads, **q), expected, rtol=1e-12)
    by_gradients = {"loss_fn": None, "grad_fn": gradient}
    actual = descent(tx, grads=grads, **by_gradients, **q)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "q", [{"perturbation_loss_fn": linear}, {"perturbation_grads": C}], ids=["loss", "gradient"]
)
@each_grads
def test_bisam_on_a_quadratic(q, grads):
    expected = A @ (W + 0.3 * C / 13) - B
    np.testing.assert_allclose(descent(bisam(0.3), grads=grads, **q), expected, rtol=1e-12)


@each_grads
@pytest.mark.parametrize("q", [{}, {"perturbation_loss_fn": None}, {"perturbation_grads": None}])
def test_bisam_insists_on_a_perturbation_loss(q, grads):
    with pytest.raises(ValueError, match=r"bisam needs a perturbation loss.*use sam"):
        descent(bisam(0.3), grads=grads, **q)


def test_steps_of_a_schedule():
    tx = sam(lambda count: jnp.where(count < 1, 0.2, 0.4))
    state = tx.init(W)
    for rho in (0.2, 0.4, 0.4):
        grads, state = problem.descent(tx, state)
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
        descent(sharpness_aware(broken))


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


@pytest.mark.parametrize(
    "q", [{"perturbation_loss_fn": linear}, {"perturbation_grads": C}], ids=["loss", "gradient"]
)
def test_grads_are_not_looked_at_when_the_perturbation_loss_is_given(q):
    tx = bisam(0.3)
    expected = descent(tx, **q)
    np.testing.assert_array_equal(descent(tx, grads=None, **q), expected)
    nan = np.full(2, np.nan)
    np.testing.assert_array_equal(descent(tx, grads=nan, **q), expected)


def test_grads_are_not_computed_again():
    points = []
    for grads, number in ((GRADIENT, 1), (None, 2)):
        points.clear()
        descent(
            sam(0.3),
            grads=grads,
            loss_fn=None,
            grad_fn=lambda w: (points.append(w), gradient(w))[1],
        )
        expected = [W, W + l2_eps(GRADIENT)][-number:]
        np.testing.assert_allclose(points, expected, rtol=1e-12)


def test_any_direction_can_be_ascended():
    momentum = np.array([3.0, -4.0])
    expected = A @ (W - 0.3 * momentum / 5) - B
    for grads in (GRADIENT, None):
        actual = descent(sam(0.3), grads=grads, perturbation_grads=-momentum)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_a_leaf_without_a_name_is_at_the_root():
    with pytest.raises(ValueError, match=r"grads does not match params: shape \(3,\) at the root"):
        descent(sam(0.3), grads=np.ones(3))


def test_adaptive_scales_follow_the_current_parameters():
    tx = sharpness_aware(adaptive_l2_ball(0.3, eta=0.0))
    moved = jnp.asarray(2 * W)
    g = gradient(2 * W)
    size = 2 * np.abs(W)
    expected = A @ (2 * W + 0.3 * size**2 * g / np.linalg.norm(size * g)) - B
    actual, _ = tx.update(jnp.asarray(g), tx.init(W), moved, loss_fn=quadratic)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
