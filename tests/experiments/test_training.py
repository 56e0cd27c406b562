"""One step and one epoch, on fake data."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import data, methods, models, training

SPLIT = data.Split(
    images=jax.random.uniform(jax.random.key(0), (40, 8, 8, 1)),
    labels=jnp.arange(40, dtype=jnp.int32) % 10,
)
LOSS = training.cross_entropy(0.1)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def setup(name, perturbation="ce", model="mlp"):
    perturbation = methods.perturbation_of(name) or perturbation
    apply, params, stats = models.create(model, (8, 8, 1), 10, seed=0)
    hyperparameters = methods.DEFAULTS[name] | methods.PERTURBATION_DEFAULTS[perturbation]
    method = methods.make(name, perturbation, OPTIMIZER, hyperparameters)
    state = training.init_state(params, stats, method, SPLIT)
    return apply, training.make_step(apply, method, LOSS), state


@pytest.mark.parametrize(
    ("name", "perturbation", "model"),
    [(name, perturbation, "mlp") for name in methods.DEFAULTS for perturbation in ("ce", "log")]
    + [(name, "ce", "cnn") for name in ("sgd", "bisam-log", "bisam-tanh")],
)
def test_a_step_lowers_the_loss_and_moves_the_statistics_once(name, perturbation, model):
    apply, step, state = setup(name, perturbation, model)
    _, clean_stats = apply(state.params, state.stats, SPLIT.images, train=True)
    new, loss = jax.jit(step)(state, SPLIT)
    chex.assert_trees_all_close(new.stats, clean_stats, rtol=1e-4, atol=1e-6)
    logits, _ = apply(state.params, state.stats, SPLIT.images, train=True)
    np.testing.assert_allclose(loss, LOSS(logits, SPLIT.labels).mean(), rtol=1e-5)
    assert new.step == 1
    for _ in range(5):
        new, later = jax.jit(step)(new, SPLIT)
    assert later < loss


def test_methods_differ():
    params = {}
    for name in methods.DEFAULTS:
        for perturbation in ("ce", "log"):
            _, step, state = setup(name, perturbation)
            for _ in range(2):
                state, _ = jax.jit(step)(state, SPLIT)
            params[name, perturbation] = state.params
    same = {("sam", "log"): ("bisam-log", "ce"), ("bisam-log", "log"): ("bisam-log", "ce")}
    same |= {("sgd", "log"): ("sgd", "ce"), ("bisam-tanh", "log"): ("bisam-tanh", "ce")}
    for key, value in params.items():
        for other_key, other in params.items():
            difference = optax.tree.norm(optax.tree.sub(value, other))
            if same.get(key, key) == same.get(other_key, other_key):
                assert difference < 1e-6
            else:
                assert difference > 1e-5, (key, other_key)


def test_unknown_method():
    with pytest.raises(ValueError, match="method must be one of sgd, sam, asam"):
        methods.make("adam", "ce", OPTIMIZER, {})
    with pytest.raises(ValueError, match="perturbation must be one of ce, log, tanh"):
        methods.make("sam", "hinge", OPTIMIZER, {})


def test_plain_training_takes_one_gradient():
    flops = {}
    for name in ("sgd", "bisam-log"):
        _, step, state = setup(name)
        flops[name] = jax.jit(step).lower(state, SPLIT).compile().cost_analysis()["flops"]
    assert 1.8 < flops["bisam-log"] / flops["sgd"] < 2.05


@pytest.mark.parametrize("number", [0, 3])
def test_one_launch_an_epoch_equals_one_a_step(number):
    _, step, state = setup("bisam-log")
    results = []
    for scan in (False, True):
        start = jax.tree.map(jnp.copy, state)
        epoch = training.make_epoch(step, start, SPLIT, jax.random.key(1), 16, scan=scan)
        results.append(epoch(start, number))
        assert results[-1][1].shape == (2,)
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


class Counter(NamedTuple):
    step: jax.Array


def test_an_epoch_sees_each_example_once_in_an_order_of_its_own():
    def step(state, batch):
        return Counter(state.step + 1), batch.labels

    split = data.Split(SPLIT.images, jnp.arange(40))
    orders = []
    for number in (0, 1, 0):
        state = Counter(jnp.int32(0))
        epoch = training.make_epoch(step, state, split, jax.random.key(1), 8, scan=True)
        orders.append(np.asarray(epoch(state, number)[1]).ravel())
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert (orders[0] == orders[2]).all()
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_spreads_over_the_other_classes(smoothing):
    logits = jnp.array([[1.0, 2.0, 4.0]])
    log_p = np.asarray(jax.nn.log_softmax(logits))[0]
    expected = -(1 - smoothing) * log_p[1] - smoothing / 2 * (log_p[0] + log_p[2])
    loss = training.cross_entropy(smoothing)(logits, jnp.array([1]))
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def test_accuracy():
    def apply(params, stats, images, *, train):
        assert not train
        return images, stats

    split = data.Split(jnp.eye(4), jnp.array([0, 1, 0, 0]))
    assert training.make_accuracy(apply)({}, {}, split) == 0.5
