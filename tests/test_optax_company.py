"""Methods together with the wrappers and optimizers of optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from bisam_jax import asam, bisam, gsam, l2_ball, sharpness_aware, value_and_grad
from tests.problems import (
    loss_of_batch,
    mlp_batch,
    mlp_params,
    perturbation_loss_of_batch,
)

PARAMS, BATCH = mlp_params(seed=1), mlp_batch(examples=32)
CLOSE = {"rtol": 2e-5, "atol": 1e-6}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def loss_fn(params):
    return loss_of_batch(params, BATCH)


def q(params):
    return perturbation_loss_of_batch(params, BATCH)


GRADS = jax.jit(jax.grad(loss_fn))(PARAMS)


@functools.partial(jax.jit, static_argnames="make")
def sharp(rho, make=bisam):
    """Returns the gradient that `make(rho)` passes on when Q is ascended."""
    tx = make(rho)
    losses = {"loss_fn": loss_fn, "perturbation_loss_fn": q}
    return tx.update(GRADS, tx.init(PARAMS), PARAMS, **losses)[0]


@functools.partial(jax.jit, static_argnames="tx")
def update(tx, state, grads):
    return tx.update(grads, state, PARAMS, loss_fn=loss_fn, perturbation_loss_fn=q)


@functools.partial(jax.jit, static_argnames="tx")
def update_with(tx, state, grads, grads_of_q):
    losses = {"loss_fn": loss_fn, "perturbation_grads": grads_of_q}
    return tx.update(grads, state, PARAMS, **losses)


def train(tx, steps, **extra_args):
    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(
            grads, state, params, loss_fn=loss_fn, perturbation_loss_fn=q, value=value, **extra_args
        )
        return (optax.apply_updates(params, updates), state), value

    return jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((PARAMS, tx.init(PARAMS)))


OPTIMIZERS = {
    "sgd": optax.sgd(0.3, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(1e-2, weight_decay=1e-2),
    "lion": optax.lion(3e-3),
    "muon": optax.contrib.muon(2e-2),
    "schedule_free_adamw": optax.contrib.schedule_free_adamw(3e-2, warmup_steps=5),
    "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5)),
}


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optimizer, id=name, marks=[] if name == "sgd" else pytest.mark.slow)
        for name, optimizer in OPTIMIZERS.items()
    ],
)
def test_base_optimizers_get_the_gradient_and_learn(optimizer):
    tx = optax.chain(bisam(0.05), optimizer)

    @jax.jit
    def both_ways(params, grads):
        losses = {"loss_fn": loss_fn, "perturbation_loss_fn": q}
        updates, _ = tx.update(grads, tx.init(params), params, **losses)
        sharp, _ = bisam(0.05).update(grads, bisam(0.05).init(params), params, **losses)
        return updates, optimizer.update(sharp, optimizer.init(params), params)[0]

    updates, expected = both_ways(PARAMS, GRADS)
    chex.assert_trees_all_close(updates, expected, **CLOSE)
    _, values = train(tx, 100)
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("make", [bisam, asam])
def test_inject_hyperparams(make):
    injected = optax.inject_hyperparams(make)(rho=optax.linear_schedule(0.1, 0.3, 2))
    state = injected.init(PARAMS)
    before, step = update._cache_size(), functools.partial(update, injected, grads=GRADS)
    for rho in (0.1, 0.2, 0.3):
        grads, state = step(state)
        assert state.hyperparams["rho"] == pytest.approx(rho)
        chex.assert_trees_all_close(grads, sharp(rho, make), **CLOSE)
    assert update._cache_size() == before + 1
    fixed = optax.inject_hyperparams(make)(rho=0.1)
    state = fixed.init(PARAMS)
    state.hyperparams["rho"] = jnp.asarray(0.0)
    grads, _ = update(fixed, state, GRADS)
    chex.assert_trees_all_close(grads, GRADS, **CLOSE)


def test_inject_hyperparams_with_a_mask():
    make = optax.inject_hyperparams(asam, static_args="where")
    tx = make(rho=0.3, where=lambda p: jax.tree.map(lambda w: w.ndim > 1, p))
    grads, _ = update(tx, tx.init(PARAMS), GRADS)
    plain = asam(0.3, where=jax.tree.map(lambda w: w.ndim > 1, PARAMS))
    expected, _ = update(plain, plain.init(PARAMS), GRADS)
    chex.assert_trees_all_close(grads, expected, **CLOSE)


def test_a_default_radius_beside_another_ball_may_be_traced():
    make = optax.inject_hyperparams(gsam, static_args="perturbation")
    tx = make(perturbation=l2_ball(0.3))
    grads, _ = update(tx, tx.init(PARAMS), GRADS)
    chex.assert_trees_all_close(grads, sharp(0.3, gsam), **CLOSE)


def test_conditionally_transform_is_sam_every_other_step():
    tx = optax.conditionally_transform(bisam(0.3), lambda step: step % 2 == 0)
    state = tx.init(PARAMS)
    for step in range(4):
        grads, state = update(tx, state, GRADS)
        chex.assert_trees_all_close(grads, GRADS if step % 2 else sharp(0.3), **CLOSE)


def test_multi_steps_after_the_step_is_m_sharpness():
    tx = bisam(0.3)
    accumulated = optax.chain(tx, optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation())

    @jax.jit
    def step(state, batch):
        losses = {
            "loss_fn": functools.partial(loss_of_batch, batch=batch),
            "perturbation_loss_fn": functools.partial(perturbation_loss_of_batch, batch=batch),
        }
        return accumulated.update(None, state, PARAMS, **losses)

    state = accumulated.init(PARAMS)
    for i in range(4):
        updates, state = step(state, jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8], BATCH))
        if i < 3:
            assert optax.tree.norm(updates) == 0
    grouped = value_and_grad(tx, loss_of_batch, perturbation_loss_of_batch, group_size=8)
    _, grads, _ = jax.jit(grouped)(PARAMS, tx.init(PARAMS), BATCH)
    chex.assert_trees_all_close(updates, optax.tree.scale(-0.1, grads), **CLOSE)


def test_freeze_before_the_ball_and_masked_after_it():
    mask = {"hidden": True, "head": False}
    tx = sharpness_aware(optax.chain(optax.transforms.freeze(mask), l2_ball(0.3)))
    points = []

    def grad_fn(point):
        points.append(point)
        return jax.grad(loss_fn)(point)

    grads, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, grad_fn=grad_fn)
    chex.assert_trees_all_equal(points[0]["hidden"], PARAMS["hidden"])
    eps = optax.tree.sub(points[0]["head"], PARAMS["head"])
    assert optax.tree.norm(eps) == pytest.approx(0.3, rel=1e-5)
    assert optax.tree.norm(grads["hidden"]) > 0


def test_reduce_on_plateau_after_it():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    tx = optax.chain(bisam(0.05), optax.sgd(0.0), plateau)
    (_, state), _ = train(tx, 10)
    assert optax.tree.get(state, "scale") < 1  # a learning rate of zero is a plateau


def test_apply_if_finite_around_and_after_it():
    broken = jax.tree.map(lambda g: jnp.full_like(g, jnp.inf), GRADS)
    after = optax.chain(bisam(0.1), optax.apply_if_finite(optax.sgd(0.1), 5))
    around = optax.apply_if_finite(optax.chain(bisam(0.1), optax.sgd(0.1)), 5)
    for tx in (after, around):
        updates, state = update_with(tx, tx.init(PARAMS), broken, broken)
        assert optax.tree.norm(updates) == 0
        assert optax.tree.get(state, "total_notfinite") == 1
        updates, _ = update(tx, state, GRADS)
        chex.assert_trees_all_close(updates, optax.tree.scale(-0.1, sharp(0.1)), **CLOSE)


def test_two_methods_in_one_chain_have_distinct_state_names():
    tx = optax.chain(bisam(lambda count: 0.1), optax.adam(1e-3))
    _, state = update(tx, tx.init(PARAMS), GRADS)
    assert optax.tree.get(state, "radius_count") == 1
    assert optax.tree.get(state, "count") == 1
