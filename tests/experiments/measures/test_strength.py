"""The strength of a perturbation, against the same worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bisam_jax
from experiments import data, models
from experiments.comparison.grid import Grid
from experiments.config.config import Config, Place
from experiments.config.recipe import resolve
from experiments.measures.strength import ascended_losses
from experiments.measures.strength_run import measured_along
from experiments.run.experiment import experiment_of
from experiments.step.layout import layout_of

pytestmark = pytest.mark.usefixtures("small_mlp")


@pytest.fixture
def experiment():
    config = Config(train_examples=64, label_smoothing=0.0)
    recipe = resolve(config)
    return experiment_of(recipe, data.load(config.source(0)), layout_of(recipe, Place(devices=1)))


def test_the_rises_of_two_batches(experiment):
    grid = Grid(methods=("sgd",), seeds=1, train_examples=64, label_smoothing=0.0)
    measured = measured_along(grid, [0], (0.1, 0.5), (1.0,), (0.1,), 2)
    found = {(m.ascended, m.rho): m for m in measured}
    assert list(found) == [
        (name, rho) for name in ("ce", "log, mu 1", "tanh, alpha 0.1, mu 1") for rho in (0.1, 0.5)
    ]
    state, train = experiment.first_state(), experiment.dataset.train

    dataset = experiment.dataset
    _, apply = models.build("mlp", dataset.image_shape, dataset.classes)

    def logits(params, part):
        pixels = (train.images[part] - dataset.mean) / dataset.std
        return apply(params, state.stats, jnp.asarray(pixels, jnp.float32), train=True)[0]

    def loss(params, part, fn):
        return fn(logits(params, part), train.labels[part]).mean()

    def error(params, part):
        return (logits(params, part).argmax(-1) != train.labels[part]).mean()

    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    rises, errors, cosines = [], [], []
    for part in (slice(0, 32), slice(32, 64)):
        plain = jax.grad(loss)(state.params, part, cross_entropy)
        ours = jax.grad(loss)(state.params, part, bisam_jax.perturbation_loss)
        eps = optax.tree.scale(0.5 / optax.tree.norm(ours), ours)
        point = optax.tree.add(state.params, eps)
        rises.append(loss(point, part, cross_entropy) - loss(state.params, part, cross_entropy))
        errors.append(error(point, part) - error(state.params, part))
        norms = optax.tree.norm(plain) * optax.tree.norm(ours)
        cosines.append(optax.tree.vdot(plain, ours) / norms)
    ours = found["log, mu 1", 0.5]
    np.testing.assert_allclose(ours.loss_rise, np.mean(rises), rtol=1e-4)
    np.testing.assert_allclose(ours.error_rise, np.mean(errors), atol=1e-6)
    np.testing.assert_allclose(ours.cosine, np.mean(cosines), rtol=1e-4)
    plain = found["ce", 0.1]
    np.testing.assert_allclose(plain.cosine, 1, rtol=1e-5)
    # To first order the training loss rises most in its own direction.
    assert all(plain.loss_rise >= m.loss_rise - 1e-6 for m in measured if m.rho == 0.1)


def test_the_training_loss_is_smoothed_as_in_training(experiment):
    logits, labels = jnp.asarray([[2.0, 0.0, 0.0]]), jnp.asarray([0])
    smoothed = ascended_losses(0.3, (1.0,), (0.1,))["ce"](logits, labels)
    target = jnp.asarray([[0.7, 0.15, 0.15]])
    np.testing.assert_allclose(smoothed, optax.losses.softmax_cross_entropy(logits, target))
