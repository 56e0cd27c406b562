"""The base optimizers by their rules, and the arguments that a method gets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bisam_jax
from experiments.config.methods import METHODS, PERTURBATIONS
from experiments.step.method import base_optimizer, build_method, learning_rate

STEPS = 5
GRADIENTS = np.random.default_rng(0).normal(size=(STEPS, 3))


def trajectory(name, **values):
    """The parameters after every step of a run of five steps."""
    optimizer = base_optimizer(name, values, STEPS)
    params = jnp.ones((1, 3))  # a matrix: AdamW decays no others
    state, seen = optimizer.init(params), []
    for gradient in jnp.asarray(GRADIENTS, jnp.float32):
        updates, state = optimizer.update(gradient[None], state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params[0])
    return np.asarray(seen)


def rate(step, learning_rate):
    """A cosine from the learning rate to zero after the last step."""
    return learning_rate * (1 + np.cos(np.pi * step / STEPS)) / 2


def test_sgd_has_momentum_weight_decay_and_a_cosine():
    params, velocity, expected = np.ones(3), np.zeros(3), []
    for step, gradient in enumerate(GRADIENTS):
        velocity = 0.8 * velocity + gradient + 0.3 * params
        params = params - rate(step, 0.2) * velocity
        expected.append(params)
    got = trajectory("sgd", learning_rate=0.2, momentum=0.8, weight_decay=0.3)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_adamw_has_decoupled_weight_decay_and_a_cosine():
    params, mean, square, expected = np.ones(3), np.zeros(3), np.zeros(3), []
    for step, gradient in enumerate(GRADIENTS):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        corrected = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
        direction = corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        params = params - rate(step, 0.2) * (direction + 0.3 * params)
        expected.append(params)
    got = trajectory("adamw", learning_rate=0.2, weight_decay=0.3)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_learning_rate_grows_and_falls():
    values = {"learning_rate": 0.5, "warmup": 0.1}
    schedule = learning_rate(values, 100)
    steps = np.array([schedule(step) for step in range(101)])
    np.testing.assert_allclose(steps[:11], 0.5 * np.arange(11) / 10, rtol=1e-6)
    expected = 0.25 * (1 + np.cos(np.pi * np.arange(91) / 90))
    np.testing.assert_allclose(steps[10:], expected, rtol=1e-5, atol=1e-8)
    assert learning_rate(values | {"warmup": 0.0}, 100)(0) == 0.5


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_only_matrices_that_are_no_embeddings_decay(name):
    params = {
        "embedding": {"embedding": np.ones((3, 4), np.float32)},
        "positions": np.ones((1, 3, 4), np.float32),
        "hidden": {"kernel": np.ones((4, 4), np.float32), "bias": np.ones(4, np.float32)},
    }
    decayed = {"embedding": {"embedding": False}, "positions": False}
    decayed["hidden"] = {"kernel": True, "bias": False}
    values = {"learning_rate": 0.1, "weight_decay": 0.5, "warmup": 0.0}
    tx = base_optimizer(name, values, 10)
    nothing = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(nothing, tx.init(params), params)
    moved = jax.tree.map(lambda p, u: not np.allclose(p, p + u), params, updates)
    assert moved == decayed
    np.testing.assert_allclose(optax.apply_updates(params, updates)["hidden"]["kernel"], 0.95)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_every_argument_of_a_method_is_its_hyperparameter(name, perturbation, monkeypatch):
    spec, given = METHODS[name], {}
    values = {option: f"value of {option}" for option in spec.options} | {"mu": 2.0, "alpha": 0.3}
    offered = {"key": 7, "batch_like": "batch", "gradient_axis": "halves"}

    def factory(**arguments):
        given.update(arguments)
        return optax.identity()

    # With the signature of the method.
    factory.__wrapped__ = spec.factory
    monkeypatch.setitem(vars(spec), "factory", factory)
    optimizer = optax.sgd(0.1)
    made = build_method(name, perturbation, optimizer, values, **offered)
    for option, argument in spec.options.items():
        assert given.pop(argument) == f"value of {option}"
    for argument, value in offered.items():
        assert given.pop(argument, value) == value
    assert given.pop("optimizer", optimizer) is optimizer
    assert given.pop("bilevel", perturbation != "ce") == (perturbation != "ce")
    assert given == {}
    assert (made.optimizer is optimizer) == (name != "sampa")
    assert (made.perturbation_loss is None) == (not spec.perturbs_weights or perturbation == "ce")


def test_every_method_has_its_own_factory():
    """Only BiSAM, and the training on attacked images, have two names."""
    factories = {name: spec.factory for name, spec in METHODS.items()}
    assert factories.pop("bisam-tanh") is factories["bisam-log"] is bisam_jax.bisam
    assert factories.pop("adversarial-l2") is factories["adversarial-linf"]
    assert len(set(factories.values())) == len(factories)


def test_the_ascended_losses_are_the_librarys():
    logits, labels = jnp.array([[1.0, 3.0, -2.0], [0.5, 0.0, 1.0]]), jnp.array([0, 2])
    for perturbation, values in {"log": {"mu": 2.0}, "tanh": {"mu": 2.0, "alpha": 0.3}}.items():
        made = build_method("sam", perturbation, optax.sgd(0.1), values | {"rho": 0.1})
        options = {}
        if perturbation == "tanh":
            options["lower_bound"] = lambda z: bisam_jax.tanh_lower_bound(z, alpha=0.3)
        expected = bisam_jax.perturbation_loss(logits, labels, mu=2.0, **options)
        np.testing.assert_allclose(made.perturbation_loss(logits, labels), expected, rtol=1e-6)


def test_an_unknown_perturbation():
    with pytest.raises(ValueError, match="perturbation must be one of ce, log, tanh, got 'hinge'"):
        jax.eval_shape(lambda: build_method("sam", "hinge", optax.sgd(0.1), {"rho": 0.1}))
