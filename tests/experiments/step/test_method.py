"""The base optimizers by their rules, and the arguments that a method gets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bisam_jax
from experiments.config.methods import METHODS, PERTURBATIONS
from experiments.step.method import base_optimizer, build_method

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
