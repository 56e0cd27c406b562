"""Adversarial training: the images of a step are attacked first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.config.config import Config, Place
from experiments.config.recipe import resolve
from experiments.run.experiment import experiment_of
from experiments.step.attack import attacked_step
from experiments.step.layout import layout_of
from experiments.step.train_step import Batch, TrainState, cross_entropy

LOSS = cross_entropy(0.0)
IMAGES = jax.random.uniform(jax.random.key(0), (6, 3, 3, 1))
BATCH = Batch(2 * IMAGES - 1, jnp.arange(6) % 2, jnp.arange(6))
WEIGHTS = jax.random.normal(jax.random.key(1), (9, 2))


def linear(params, stats, images, *, train, keys):
    assert train
    return images.reshape(len(images), -1) @ params, stats


def seen(norm, radius, batch=BATCH, steps=10, number=3):
    """The images that reach the step, in [0, 1]."""
    step = attacked_step(
        lambda state, batch: (state, batch.images),
        linear,
        LOSS,
        norm,
        radius,
        steps,
        to_pixels=lambda images: (images + 1) / 2,
        from_pixels=lambda pixels: 2 * pixels - 1,
    )
    state = TrainState(jnp.int32(number), jax.random.key(2), WEIGHTS, {}, (), ())
    return (jax.jit(step)(state, batch)[1] + 1) / 2


def losses(pixels):
    return LOSS((2 * pixels - 1).reshape(6, -1) @ WEIGHTS, BATCH.labels)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_are_attacked_inside_the_ball(norm):
    radius = 20.0
    found = seen(norm, radius)
    moved = np.asarray(found - IMAGES)
    size = abs(moved).max((1, 2, 3)) if norm == "linf" else np.sqrt((moved**2).sum((1, 2, 3)))
    assert (size <= radius / 255 + 1e-6).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert (losses(found) > losses(IMAGES) + 0.02).all()
    # To first order, no point of the ball has a higher loss than the corner of all signs.
    if norm == "linf":
        gradient = jax.grad(lambda pixels: losses(pixels).sum())(IMAGES)
        corner = jnp.clip(IMAGES + radius / 255 * jnp.sign(gradient), 0, 1)
        np.testing.assert_allclose(found, corner, atol=1e-6)


def test_the_random_start_depends_on_step_and_position_only():
    start = functools.partial(seen, "linf", 8.0, steps=0)
    assert abs(start() - start(number=4)).max() > 1 / 255
    assert abs((start() - IMAGES)[0] - (start() - IMAGES)[1]).max() > 1 / 255
    parts = [start(jax.tree.map(lambda x, p=p: x[p], BATCH)) for p in (slice(0, 2), slice(2, 6))]
    np.testing.assert_array_equal(jnp.concatenate(parts), start())


def experiment(method, **options):
    config = Config(train_examples=64, epochs=1, method=method, **options)
    recipe = resolve(config)
    return experiment_of(recipe, data.load(config.source(0)), layout_of(recipe, Place(devices=1)))


@pytest.mark.usefixtures("small_mlp")
def test_a_run_attacks_the_images_it_is_trained_on():
    def after_a_step(method, **options):
        made = experiment(method, **options)
        batch = jax.tree.map(lambda x: jnp.asarray(x[:32]), made.dataset.train)
        state, loss = jax.jit(made.step)(made.first_state(), batch)
        return state.params, float(loss)

    plain, loss = after_a_step("sgd")
    same, same_loss = after_a_step("adversarial-linf", attack_radius=0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, same)
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for method in ("adversarial-linf", "adversarial-l2"):
        _, small = after_a_step(method, attack_radius=4.0)
        _, large = after_a_step(method, attack_radius=64.0)
        assert loss < small < large


@pytest.mark.slow
def test_a_convolutional_network_is_attacked():
    made = experiment("adversarial-linf", model="cnn", attack_radius=64.0)
    batch = jax.tree.map(lambda x: jnp.asarray(x[:32]), made.dataset.train)
    _, loss = jax.jit(made.step)(made.first_state(), batch)
    plain = experiment("sgd", model="cnn")
    _, clean = jax.jit(plain.step)(plain.first_state(), batch)
    assert loss > clean + 0.01
