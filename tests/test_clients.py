"""Real models: flax.linen in a TrainState, NNX through nnx.Optimizer, Equinox.

Each has batch normalisation, and each must end a step with the statistics of one clean pass.
"""

from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from bisam_jax import bisam, perturbation_loss, value_and_grad

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 5)).astype(np.float32)
Y = RNG.integers(0, 3, 16)
RHO = 0.2
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def cross_entropy(logits):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def q(logits):
    return perturbation_loss(logits, Y).mean()


def descent_by_hand(ascent, loss_fn, params):
    norm = optax.tree.norm(ascent)
    point = jax.tree.map(lambda p, g: p + RHO * g / norm, params, ascent)
    return jax.grad(loss_fn)(point)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(3)(nn.relu(x))


class BatchStatsState(TrainState):
    batch_stats: Any


@pytest.fixture
def linen():
    model = LinenNet()
    variables = jax.jit(model.init)(jax.random.key(2), X)
    return model, variables["params"], variables["batch_stats"]


def linen_reference(model, params, batch_stats):
    """Reference by hand: one clean pass, then the descent gradient at the perturbed point."""

    def forward(params):
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, X, mutable=["batch_stats"])

    def clean(params):
        logits, moved = forward(params)
        return q(logits), moved["batch_stats"]

    @jax.jit
    def reference(params):
        ascent, stats = jax.grad(clean, has_aux=True)(params)
        return descent_by_hand(ascent, lambda p: cross_entropy(forward(p)[0]), params), stats

    return reference(params)


def test_linen_in_a_train_state(linen):
    model, params, batch_stats = linen
    base = optax.sgd(0.1, momentum=0.9)
    state = BatchStatsState.create(
        apply_fn=model.apply, params=params, tx=base, batch_stats=batch_stats
    )

    def with_stats(loss):
        def fn(params, x):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, moved = state.apply_fn(variables, x, mutable=["batch_stats"])
            return loss(logits), moved["batch_stats"]

        return fn

    step = value_and_grad(bisam(RHO), with_stats(cross_entropy), with_stats(q), has_aux=True)
    sharpness_state = bisam(RHO).init(params)

    @jax.jit
    def train_step(state, sharpness_state):
        (_, stats), grads, sharpness_state = step(state.params, sharpness_state, X)
        return state.apply_gradients(grads=grads, batch_stats=stats), sharpness_state, grads

    state, _, grads = train_step(state, sharpness_state)
    expected_grads, expected_stats = linen_reference(*linen)
    chex.assert_trees_all_close(grads, expected_grads, **CLOSE)
    chex.assert_trees_all_close(state.batch_stats, expected_stats, **CLOSE)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, expected_grads)
    chex.assert_trees_all_close(state.params, expected, **CLOSE)
    assert state.step == 1


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.hidden(x))))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_nnx_through_its_optimizer():
    model = NnxNet(nnx.Rngs(0))
    # Split from a copy: the optimizer changes the variables of the model in place.
    graphdef, params, stats = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)
    base = optax.adamw(1e-2, eps=1e-3)  # some gradients are rounding noise alone
    optimizer = nnx.Optimizer(model, base, wrt=nnx.Param)

    def with_stats(loss):
        def fn(params, x):
            copy = nnx.merge(graphdef, params, stats, copy=True)
            logits = copy(x)
            return loss(logits), nnx.state(copy, nnx.BatchStat)

        return fn

    tx = bisam(RHO)
    step = value_and_grad(tx, with_stats(cross_entropy), with_stats(q), has_aux=True)
    (_, moved), grads, _ = jax.jit(step)(params, tx.init(params), X)
    nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))(optimizer, model, grads)
    nnx.update(model, moved)

    clean = NnxNet(nnx.Rngs(0))
    clean(X)
    expected_stats = nnx.state(clean, nnx.BatchStat)
    chex.assert_trees_all_close(nnx.state(model, nnx.BatchStat), expected_stats, **CLOSE)

    @jax.jit
    def reference(params):
        ascent = jax.grad(lambda p: with_stats(q)(p, X)[0])(params)
        grads = descent_by_hand(ascent, lambda p: with_stats(cross_entropy)(p, X)[0], params)
        updates, _ = base.update(grads, base.init(params), params)
        return grads, optax.apply_updates(params, updates)

    expected_grads, expected = reference(params)
    chex.assert_trees_all_close(grads, expected_grads, **CLOSE)
    chex.assert_trees_all_close(nnx.state(model, nnx.Param), expected, **CLOSE)


@pytest.mark.slow
def test_nnx_optimizer_with_the_step_in_its_chain():
    model = NnxNet(nnx.Rngs(0))
    # Split from a copy: the optimizer changes the variables of the model in place.
    graphdef, params, stats = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)
    optimizer = nnx.Optimizer(model, optax.chain(bisam(RHO), optax.sgd(0.1)), wrt=nnx.Param)

    def loss_of(loss):
        return lambda params: loss(nnx.merge(graphdef, params, stats, copy=True)(X))

    def clean(model):
        return cross_entropy(model(X))

    grads = nnx.grad(clean)(model)  # moves the statistics, once
    losses = {"loss_fn": loss_of(cross_entropy), "perturbation_loss_fn": loss_of(q)}
    optimizer.update(model, grads, **losses)

    @jax.jit
    def reference(params):
        return descent_by_hand(jax.grad(loss_of(q))(params), loss_of(cross_entropy), params)

    descent = reference(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, descent)
    chex.assert_trees_all_close(nnx.state(model, nnx.Param), expected, **CLOSE)
    once = NnxNet(nnx.Rngs(0))
    once(X)
    stats_of = [nnx.state(m, nnx.BatchStat) for m in (model, once)]
    chex.assert_trees_all_close(*stats_of, **CLOSE)


class EquinoxNet(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(5, 8, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, "batch", momentum=0.9, mode="batch")
        self.head = eqx.nn.Linear(8, 3, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.hidden(x), state)
        return self.head(jax.nn.relu(x)), state


@pytest.mark.slow
def test_equinox():
    model, statistics = eqx.filter_jit(eqx.nn.make_with_state(EquinoxNet))(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def forward(params):
        model = eqx.combine(params, static)
        batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return batched(X, statistics)

    def with_statistics(loss):
        def fn(params, x):
            logits, moved = forward(params)
            return loss(logits), moved

        return fn

    tx = optax.chain(bisam(RHO), optax.sgd(0.1))
    step = value_and_grad(tx, with_statistics(cross_entropy), with_statistics(q), has_aux=True)
    (_, moved), updates, _ = eqx.filter_jit(step)(params, tx.init(params), X)
    new = eqx.apply_updates(params, updates)
    expected_statistics = jax.jit(forward)(params)[1]
    assert eqx.tree_equal(moved, expected_statistics, rtol=1e-5, atol=1e-6)
    assert not eqx.tree_equal(moved, statistics, rtol=1e-5, atol=1e-6)

    @jax.jit
    def reference(params):
        ascent = jax.grad(lambda p: q(forward(p)[0]))(params)
        return descent_by_hand(ascent, lambda p: cross_entropy(forward(p)[0]), params)

    descent = reference(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, descent)
    chex.assert_trees_all_close(jax.tree.leaves(new), jax.tree.leaves(expected), **CLOSE)
