"""Attacks against linear networks, whose worst perturbations are known, and masked gradients."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.measures.attacks import (
    CROSS_ENTROPY,
    MARGIN,
    WORST,
    Attacker,
    margin_loss,
    usual_attack,
)
from experiments.measures.masking import checked
from experiments.measures.trained import Sample, Trained

SHAPE = (3, 3, 1)
# Grey images: no attack here reaches the ends of the scale.
IMAGES = np.full((40, *SHAPE), 128, np.uint8)
WEIGHTS = np.random.default_rng(0).normal(size=(2, 9, 2)).astype(np.float32)
LABELS = np.stack([np.zeros(40, np.int32), np.arange(40, dtype=np.int32) % 2])


def linear(params, stats, pixels):
    return (pixels.reshape(len(pixels), -1) / 255 - 128 / 255) @ params["w"] + params["b"]


def networks(predict=linear, bias=None):
    """Two networks with two classes; `bias` is how far class 0 is above class 1."""
    bias = np.zeros(2) if bias is None else bias
    params = {"w": jnp.asarray(WEIGHTS), "b": jnp.stack([jnp.asarray(bias), jnp.zeros(2)], -1)}
    recipe = types.SimpleNamespace(dataset="cifar10", model="mlp")
    sample = Sample(IMAGES, LABELS)
    return Trained("linear", recipe, (0, 1), params, {}, predict, sample, sample)  # type: ignore[arg-type]


def norms(order):
    difference = WEIGHTS[..., 0] - WEIGHTS[..., 1]
    return np.linalg.norm(difference, order, axis=1)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_an_attack_finds_the_worst_point_of_a_linear_network(norm, dual):
    """The logit of class 0 falls by the radius times the dual norm of the weights."""
    radius = 8.0
    reach = radius / 255 * norms(dual)
    # Ten steps of the usual size do not turn every random start into that direction.
    attack = usual_attack(norm, radius, steps=40)
    right = Attacker(networks(bias=1.01 * reach)).accuracies(attack)
    assert right[WORST].tolist() == [1.0, 0.5]
    wrong = Attacker(networks(bias=0.96 * reach)).accuracies(attack)
    assert wrong[WORST].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["cross-entropy", MARGIN])
def test_attacked_images_stay_in_the_ball_and_are_images(norm, loss):
    trained = networks()
    bright = trained.test._replace(images=np.full_like(IMAGES, 250))
    for sample in (trained.test, bright):
        attacker = Attacker(trained._replace(test=sample))
        attacked = np.asarray(attacker.images(usual_attack(norm, 20.0), loss, 1))
        moved = attacked - sample.images / 255
        size = abs(moved).max((2, 3, 4)) if norm == "linf" else np.sqrt((moved**2).sum((2, 3, 4)))
        assert (size <= 20 / 255 + 1e-6).all()
        assert (size > 5 / 255).all()
        assert attacked.min() >= 0
        assert attacked.max() <= 1


def test_starts_are_random_and_restarts_only_strengthen():
    attacker = Attacker(networks())
    none = usual_attack("linf", 8.0)._replace(steps=0)
    first, second = (attacker.images(none, MARGIN, n) for n in (0, 1))
    assert abs(np.asarray(first - second)).max() > 1 / 255
    one, many = (attacker.accuracies(none._replace(restarts=n)) for n in (1, 8))
    assert (many[WORST] < one[WORST]).all()


def test_the_margin():
    logits = jnp.array([[1.0, 3.0, 2.0], [5.0, 3.0, 2.0]])
    np.testing.assert_allclose(margin_loss(logits, jnp.array([2, 0])), [1.0, -2.0])


def quantised(params, stats, pixels):
    """Rounded pixels have no gradient."""
    return linear(params, stats, jnp.round(pixels / 8) * 8)


def test_masked_gradients_are_found():
    reach = 2.0 / 255 * norms(1)
    attack = usual_attack("linf", 2.0)
    plain = ("plain", Attacker(networks(bias=0.5 * reach)))
    honest = Attacker(networks(bias=0.7 * reach))
    checks, rows = checked("honest", (0, 1), honest, attack, plain)
    assert [check.holds for check in checks] == [True, True, True]
    assert {row.source for row in rows} == {"", "plain"}
    # The right classes stay right at random, though a small change of every pixel is enough.
    masked = Attacker(networks(quantised, bias=0.7 * reach))
    checks, _ = checked("masked", (0, 1), masked, usual_attack("linf", 5.0), plain)
    assert [check.holds for check in checks] == [False, True, False]
    checks, _ = checked("masked", (0, 1), masked, attack, None)
    assert checks[-1].holds is None


def test_networks_are_attacked_separately():
    """The first network is robust, the second is not."""
    found = Attacker(networks(bias=np.array([9.0, 0.01]))).accuracies(usual_attack("l2", 16.0))
    assert found[WORST].tolist() == [1.0, 0.0]
    assert jax.tree.all({name: len(values) == 2 for name, values in found.items()})


def test_the_worst_of_two_losses(monkeypatch):
    attacker = Attacker(networks(bias=0.5 * 8 / 255 * norms(1)))
    real, clean = attacker.images, jnp.broadcast_to(IMAGES[None] / 255, (2, *IMAGES.shape))

    def weak_margin(attack, loss, restart):
        return clean if loss == MARGIN else real(attack, loss, restart)

    monkeypatch.setattr(attacker, "images", weak_margin)
    found = attacker.accuracies(usual_attack("linf", 8.0))
    assert (found[MARGIN] > found[CROSS_ENTROPY]).all()
    np.testing.assert_array_equal(found[WORST], found[CROSS_ENTROPY])
