"""Sharpness: closed forms on a quadratic, and the optimizer's own point."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bisam_jax
from bisam_jax import adaptive_l2_ball, average_sharpness, l2_ball, linf_ball, sharpness

DIAGONAL = jnp.array([5.0, 2.0, 0.5])
BATCH = jnp.array([[4.0, 1.0, 0.5], [6.0, 3.0, 0.5]])  # its mean is the diagonal
W = jnp.array([0.3, -1.0, 2.0])


def loss_fn(w, batch):
    """A quadratic whose Hessian is diag(mean of batch)."""
    return 0.5 * batch @ w**2


def other_loss_fn(w, batch):
    return batch @ w


def quadratic(w):
    return 0.5 * jnp.sum(DIAGONAL * w**2)


def test_one_step_is_the_point_that_sam_takes():
    seen = []

    def spy(w, batch):
        jax.debug.callback(seen.append, w)
        return loss_fn(w, batch)

    method = bisam_jax.sam(0.5)
    bisam_jax.value_and_grad(method, spy)(W, method.init(W), BATCH)
    jax.effects_barrier()
    rise, point = sharpness(loss_fn, W, BATCH, l2_ball(0.5))
    np.testing.assert_allclose(point, seen[-1], rtol=1e-6)
    gradient = DIAGONAL * W
    expected = W + 0.5 * gradient / jnp.linalg.norm(gradient)
    np.testing.assert_allclose(point, expected, rtol=1e-6)
    np.testing.assert_allclose(rise, quadratic(expected) - quadratic(W), rtol=1e-5)


def test_q_is_ascended_and_the_rise_is_of_l():
    rise, point = sharpness(loss_fn, W, BATCH, l2_ball(0.5), perturbation_loss_fn=other_loss_fn)
    expected = W + 0.5 * DIAGONAL / jnp.linalg.norm(DIAGONAL)
    np.testing.assert_allclose(point, expected, rtol=1e-6)
    np.testing.assert_allclose(rise, quadratic(expected) - quadratic(W), rtol=1e-5)


def test_the_worst_case_of_a_quadratic():
    """Around its minimum, it is rho^2 / 2 times the largest eigenvalue."""
    start = jnp.array([1e-3, 1e-3, 1e-3])
    rise, point = sharpness(loss_fn, start, BATCH, l2_ball(0.5), steps=100)
    np.testing.assert_allclose(jnp.linalg.norm(point - start), 0.5, rtol=1e-4)
    np.testing.assert_allclose(rise, 0.5 * 5.0 * 0.25, rtol=0.01)
    one_step, _ = sharpness(loss_fn, start, BATCH, l2_ball(0.5))
    assert rise > one_step


@pytest.mark.parametrize("ball", [l2_ball(0.7), linf_ball(0.3), adaptive_l2_ball(0.5, eta=0.1)])
def test_more_steps_never_lower_the_ascended_loss_and_stay_in_the_ball(ball):
    def rough(w, batch):
        return jnp.sin(3 * batch @ w) + 0.1 * batch @ w**2

    rises = [sharpness(rough, W, BATCH, ball, steps=steps).rise for steps in (1, 2, 5, 20)]
    assert np.all(np.diff(rises) >= -1e-6)
    _, point = sharpness(rough, W, BATCH, ball, steps=20)
    # No point of the ball is farther in the direction of the step than the ball's own.
    eps = point - W
    farthest, _ = ball.update(eps, ball.init(W), W)
    assert eps @ eps <= (farthest @ eps) * (1 + 1e-5)


def test_the_cube():
    rise, point = sharpness(loss_fn, W, BATCH, linf_ball(0.1))
    np.testing.assert_allclose(point, W + 0.1 * jnp.sign(W), rtol=1e-6)
    np.testing.assert_allclose(rise, quadratic(W + 0.1 * jnp.sign(W)) - quadratic(W), rtol=1e-5)


def two_layers(w, batch):
    return (batch @ (jnp.maximum(w["a"], 0.0) * w["b"])) ** 2


def test_the_adaptive_measure_does_not_change_if_the_network_is_rescaled():
    """Rectified units: (a, b) and (c a, b / c) are the same function."""
    params = {"a": jnp.array([1.0, 0.5, 2.0]), "b": jnp.array([0.3, -1.0, 0.7])}
    scaled = {"a": 4.0 * params["a"], "b": params["b"] / 4.0}
    adaptive = [
        sharpness(two_layers, w, BATCH, adaptive_l2_ball(0.1, eta=0.0), steps=3).rise
        for w in (params, scaled)
    ]
    np.testing.assert_allclose(*adaptive, rtol=1e-4)
    plain = [sharpness(two_layers, w, BATCH, l2_ball(0.1)).rise for w in (params, scaled)]
    assert abs(plain[0] - plain[1]) > 0.1 * plain[0]


def test_the_average_case_of_a_quadratic():
    """On the sphere, the mean of a quadratic form is its trace over the dimension."""
    mean, error = average_sharpness(
        loss_fn, jnp.zeros(3), BATCH, l2_ball(0.5), key=1, num_samples=2000
    )
    expected = 0.5 * 0.25 * DIAGONAL.sum() / 3
    assert abs(mean - expected) < 4 * error
    assert 0 < error < 0.02 * expected
    again, _ = average_sharpness(
        loss_fn, jnp.zeros(3), BATCH, l2_ball(0.5), key=jax.random.key(1), num_samples=2000
    )
    assert mean == again


@pytest.mark.parametrize("measure", ["worst", "average"])
def test_batches_and_microbatches_are_one_batch(measure):
    batch = jax.random.uniform(jax.random.key(0), (12, 3))

    def measured(batch, **options):
        if measure == "worst":
            return sharpness(loss_fn, W, batch, l2_ball(0.5), steps=3, **options).rise
        return average_sharpness(loss_fn, W, batch, l2_ball(0.5), key=0, **options).mean

    whole = measured(batch)
    np.testing.assert_allclose(measured(batch, microbatch_size=4), whole, rtol=1e-5)
    parts = [batch[:2], batch[2:7], batch[7:]]
    np.testing.assert_allclose(measured(parts), whole, rtol=1e-5)
    np.testing.assert_allclose(measured(iter(parts)), whole, rtol=1e-5)
    scalar = sharpness(lambda w, b: loss_fn(w, b).mean(), W, batch, l2_ball(0.5), steps=3).rise
    if measure == "worst":
        np.testing.assert_allclose(scalar, whole, rtol=1e-6)


def test_seeds_are_mapped():
    seeds = jnp.stack([W, 2 * W])

    def measured(w):
        return sharpness(loss_fn, w, BATCH, l2_ball(0.5), steps=4).rise

    mapped = jax.jit(jax.vmap(measured))(seeds)
    np.testing.assert_allclose(mapped, jnp.stack([measured(w) for w in seeds]), rtol=1e-5)


def test_leaves_of_every_kind():
    params = {"w": W.astype(jnp.bfloat16), "n": jnp.arange(3), "none": None}
    rise, point = sharpness(lambda p, b: loss_fn(p["w"], b), params, BATCH, l2_ball(0.5))
    assert point["w"].dtype == jnp.float32
    np.testing.assert_array_equal(point["n"], params["n"])
    exact = sharpness(loss_fn, params["w"].astype(jnp.float32), BATCH, l2_ball(0.5)).rise
    np.testing.assert_allclose(rise, exact, rtol=1e-5)


def test_a_chain_perturbs_only_some_leaves():
    params = {"a": W, "b": W}
    ball = optax.chain(optax.transforms.freeze({"a": False, "b": True}), l2_ball(0.5))
    _, point = sharpness(lambda p, b: loss_fn(p["a"] + p["b"], b), params, BATCH, ball, steps=3)
    np.testing.assert_array_equal(point["b"], W)
    np.testing.assert_allclose(jnp.linalg.norm(point["a"] - W), 0.5, rtol=1e-5)


def test_a_zero_gradient_gives_no_rise():
    rise, point = sharpness(loss_fn, jnp.zeros(3), BATCH, l2_ball(0.5), steps=3)
    assert rise == 0
    np.testing.assert_array_equal(point, jnp.zeros(3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"perturbation": 0.05}, TypeError, "perturbation must be an optax transformation"),
        ({"steps": 0}, ValueError, "steps must be"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"batch": []}, ValueError, "at least one batch, got none"),
        ({"microbatch_size": 3}, ValueError, "microbatch_size must divide the batch"),
        ({"loss_fn": lambda w, b: w}, TypeError, "loss_fn must return one real floating scalar"),
    ],
)
def test_wrong_use(options, error, message):
    given = {"loss_fn": loss_fn, "params": W, "batch": BATCH, "perturbation": l2_ball(0.5)}
    with pytest.raises(error, match=message):
        sharpness(**{**given, **options})


def test_too_few_samples():
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        average_sharpness(loss_fn, W, BATCH, l2_ball(0.5), key=0, num_samples=1)
