import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bisam_jax import ScheduledRadiusState, adaptive_l2_ball, l2_ball
from tests.problems import global_norm

pytestmark = pytest.mark.optimized

GRADIENT = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}


def perturb(ball, gradient, params=None):
    return ball.update(gradient, ball.init(params), params)[0]


jitted_perturb = jax.jit(perturb, static_argnames="ball")
perturb_to = jax.jit(lambda rho, gradient: perturb(l2_ball(rho), gradient))


def test_l2_ball_by_hand():
    eps = perturb(l2_ball(0.5), GRADIENT)
    np.testing.assert_allclose(eps["a"], [0.3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(eps["b"], [[0.4]], rtol=1e-6)


def test_adaptive_l2_ball_by_hand():
    # T = (1.5, 2.5, 1), T g = (4.5, 0, 4), T^2 g = (6.75, 0, 4)
    eps = perturb(adaptive_l2_ball(2.0, eta=0.5), GRADIENT, PARAMS)
    norm = np.hypot(4.5, 4.0)
    np.testing.assert_allclose(eps["a"], [2 * 6.75 / norm, 0.0], rtol=1e-6)
    np.testing.assert_allclose(eps["b"], [[2 * 4 / norm]], rtol=1e-6)


@pytest.mark.parametrize(
    "where",
    [
        {"a": True, "b": False},
        lambda params: jax.tree.map(lambda w: w.ndim == 1, params),
        {"a": np.True_, "b": np.False_},
    ],
    ids=["tree", "function", "numpy"],
)
def test_adaptive_l2_ball_where(where):
    # T = (1.5, 2.5) on a and 1 on b: T g = (4.5, 0, 4), T^2 g = (6.75, 0, 4)
    params = {"a": PARAMS["a"], "b": jnp.array([[7.0]])}
    eps = perturb(adaptive_l2_ball(2.0, eta=0.5, where=where), GRADIENT, params)
    norm = np.hypot(4.5, 4.0)
    np.testing.assert_allclose(eps["a"], [2 * 6.75 / norm, 0.0], rtol=1e-6)
    np.testing.assert_allclose(eps["b"], [[2 * 4 / norm]], rtol=1e-6)


@given(
    gradient=hnp.arrays(np.float32, 6, elements=st.floats(-(2.0**127), 2.0**127, width=32)),
    rho=st.floats(1e-3, 1e3),
)
def test_norm_is_rho_or_zero(gradient, rho):
    eps = perturb_to(rho, {"a": gradient[:2], "b": gradient[2:]})
    if np.abs(gradient).max() < np.finfo(np.float32).tiny:
        assert global_norm(eps) == 0
    else:
        np.testing.assert_allclose(global_norm(eps), rho, rtol=1e-5)


BALLS = (l2_ball(0.1), adaptive_l2_ball(0.1))


@given(
    gradient=hnp.arrays(np.float32, 6, elements=st.floats(-1, 1, width=32)),
    exponent=st.integers(-60, 60),
)
def test_scale_of_the_gradient_does_not_matter(gradient, exponent):
    gradient = np.where(np.abs(gradient) < 1e-3, 0, gradient).astype(np.float32)
    params = jnp.linspace(-1.0, 1.0, 6)
    for ball in BALLS:
        once = jitted_perturb(ball, jnp.asarray(gradient), params)
        scaled = jitted_perturb(ball, jnp.asarray(gradient * np.float32(2.0) ** exponent), params)
        np.testing.assert_allclose(scaled, once, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-21, 1e-37, 1e19, 3e38])
def test_extreme_gradients_keep_their_direction(size):
    gradient = jnp.array([3.0, -4.0]) / 5 * jnp.float32(size)
    expected = np.array([0.3, -0.4])
    np.testing.assert_allclose(perturb(l2_ball(0.5), gradient), expected, rtol=1e-5)
    ball, params = adaptive_l2_ball(0.5, eta=0.0), jnp.array([1.0, 1.0])
    np.testing.assert_allclose(perturb(ball, gradient, params), expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-37, 2e37])
def test_adaptive_scales_do_not_leave_the_range(size):
    gradient, params = jnp.array([3.0, -4.0]) * jnp.float32(size), jnp.array([10.0, 20.0])
    expected = perturb(adaptive_l2_ball(0.5), jnp.array([3.0, -4.0]), params)
    np.testing.assert_allclose(
        perturb(adaptive_l2_ball(0.5), gradient, params), expected, rtol=1e-5
    )


@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
def test_non_finite_gradients_are_not_hidden(value):
    gradient = {"a": jnp.array([value, 1.0]), "b": jnp.array(1.0)}
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(perturb(l2_ball(0.1), gradient)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_norm_of_narrow_gradients_is_taken_in_float32(dtype):
    # In bfloat16, the sum over 1,000 leaves would stop growing at 256.
    gradient = [jnp.ones(1, dtype)] * 1000
    eps = perturb(l2_ball(1.0), gradient)
    assert all(leaf.dtype == dtype for leaf in eps)
    expected = jnp.asarray(1000**-0.5, dtype)
    assert all((leaf == expected).all() for leaf in eps)


def test_structures():
    gradient = {
        "none": None,
        "scalar": jnp.float32(3.0),
        "python scalar": 4.0,
        "empty": jnp.zeros((0, 3)),
        "tuple": (jnp.zeros(2), ()),
        "integer": jnp.array([7]),
    }
    eps = perturb(l2_ball(5.0), gradient)
    assert jax.tree.structure(eps) == jax.tree.structure(gradient)
    np.testing.assert_allclose(eps["scalar"], 3.0, rtol=1e-6)
    np.testing.assert_allclose(eps["python scalar"], 4.0, rtol=1e-6)
    assert eps["integer"] == 0
    assert perturb(l2_ball(1.0), {}) == {}
    assert perturb(l2_ball(1.0), {"empty": jnp.zeros(0)})["empty"].size == 0


@pytest.mark.parametrize("make", [l2_ball, adaptive_l2_ball])
def test_schedule_counts_perturbations(make):
    ball = make(lambda count: 1.0 / (1 + count).astype(jnp.float32))
    state = ball.init(PARAMS)
    assert isinstance(state, ScheduledRadiusState)
    update = jax.jit(ball.update)
    first, state = update(GRADIENT, state, PARAMS)
    for step in range(1, 4):
        eps, state = update(GRADIENT, state, PARAMS)
        np.testing.assert_allclose(eps["b"] * (1 + step), first["b"], rtol=1e-6)
    assert optax.tree.get(state, "radius_count") == 4
    assert make(0.1).init(PARAMS) == optax.EmptyState()


def test_freeze_before_the_ball_takes_the_norm_over_the_rest():
    pipeline = optax.chain(optax.transforms.freeze({"a": True, "b": False}), l2_ball(0.5))
    eps = perturb(pipeline, GRADIENT, PARAMS)
    assert (eps["a"] == 0).all()
    np.testing.assert_allclose(eps["b"], [[0.5]], rtol=1e-6)


def test_partition_gives_each_part_a_ball_of_its_own():
    pipeline = optax.partition({"x": l2_ball(0.5), "y": l2_ball(2.0)}, {"a": "x", "b": "y"})
    eps = perturb(pipeline, GRADIENT, PARAMS)
    np.testing.assert_allclose(eps["a"], [0.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(eps["b"], [[2.0]], rtol=1e-6)


def test_gradient_through_the_perturbation_is_finite_and_right():
    def first_component(g):
        return perturb(l2_ball(2.0), g)[0]

    g = jnp.array([3.0, 4.0])
    # d/dg of 2 g_1 / |g| is 2 (|g|^2 e_1 - g_1 g) / |g|^3
    np.testing.assert_allclose(
        jax.grad(first_component)(g), [2 * 16 / 125, -2 * 12 / 125], rtol=1e-6
    )
    assert (jax.grad(first_component)(jnp.zeros(2)) == 0).all()


@pytest.mark.parametrize(
    "rho", [-0.1, float("nan"), float("inf"), 1e39, np.float32(-1), jnp.array(-1.0)]
)
@pytest.mark.parametrize("make", [l2_ball, adaptive_l2_ball])
def test_bad_radius(make, rho):
    with pytest.raises(ValueError, match=r"rho must be finite, >= 0, got"):
        make(rho)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: l2_ball("0.1"), TypeError, "rho must be a real number, got '0.1'"),
        (
            lambda: perturb(l2_ball(lambda count: jnp.ones(3)), GRADIENT),
            ValueError,
            r"rho must return a scalar, got shape \(3,\)",
        ),
        (lambda: l2_ball(None), TypeError, "rho must be a real number"),
        (lambda: l2_ball(True), TypeError, "rho must be a real number"),
        (lambda: l2_ball(1j), TypeError, "rho must be a real number"),
        (lambda: l2_ball(jnp.ones(2)), ValueError, r"rho must be a scalar, got shape \(2,\)"),
        (lambda: adaptive_l2_ball(0.1, eta=-1.0), ValueError, "eta must be finite, >= 0"),
        (lambda: perturb(adaptive_l2_ball(0.1), GRADIENT), ValueError, "needs the parameters"),
        (
            lambda: perturb(adaptive_l2_ball(0.1, where={"a": True}), GRADIENT, PARAMS),
            ValueError,
            "where must be a tree of booleans",
        ),
        (
            lambda: perturb(adaptive_l2_ball(0.1), {"a": GRADIENT["a"]}, PARAMS),
            ValueError,
            r"the gradient does not match params: no leaf at \['b'\]",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
