"""Experiments: every option reaches the step, and every random number the seed."""

import functools
import itertools
import types

import jax
import numpy as np
import pytest

from experiments import data
from experiments.config.config import Config
from experiments.config.recipe import resolve
from experiments.run.experiment import _prepare
from experiments.run.training import experiment_from
from experiments.step.train_step import keys_of
from experiments.system.command_line import ArgumentError

pytestmark = pytest.mark.usefixtures("small_mlp")

PLAIN = {"method": "sgd"}
MIXED = {"method": "bisam-log", "label_smoothing": 0.0}
VIT = {"model": "vit_tiny", "method": "bisam-log"}
WAYS = {
    "plain": PLAIN,
    "other seed": PLAIN | {"seed": 1},
    "bfloat16": PLAIN | {"precision": "bfloat16"},
    "crop": PLAIN | {"crop_padding": 1},
    "flip": PLAIN | {"flip": True},
    "cutout": PLAIN | {"cutout": 0.5},
    "more cutout": PLAIN | {"cutout": 1.0},
    "no smoothing": PLAIN | {"label_smoothing": 0.0},
    "adamw": PLAIN | {"base": "adamw"},
    "decay": PLAIN | {"weight_decay": 0.5},
    "momentum": PLAIN | {"momentum": 0.0},
    "length": PLAIN | {"epochs": 1},
    "mixed": MIXED,
    "rho": MIXED | {"rho": 0.5},
    "in parts": MIXED | {"microbatch_size": 16},
    "later": MIXED | {"start_step": 2},
    "now and then": MIXED | {"every": 2},
    "groups": MIXED | {"group_size": 8},
    "groups in parts": MIXED | {"group_size": 8, "microbatch_size": 16},
    "vit": VIT,
    "vit in parts": VIT | {"microbatch_size": 8},
    "groups of one": VIT | {"group_size": 1},
}
# Without batch statistics, microbatches change only the order of sums. Groups have the same
# perturbation, whatever part of the batch is computed at once.
SAME = [{"vit", "vit in parts"}, {"groups", "groups in parts"}]
KEPT = {"plain", "bfloat16", "crop", "flip", "cutout", "no smoothing", "mixed"}
KEPT |= {"in parts", "later", "now and then", "groups"}


@functools.cache
def losses_of(name):
    """The losses of four steps on the first examples."""
    experiment = experiment_from(Config(devices=1, train_examples=64, **{"epochs": 2} | WAYS[name]))
    batch = jax.tree.map(lambda x: x[:32], experiment.train.split)
    state, losses, step = experiment.first_state(), [], jax.jit(experiment.step)
    for _ in range(4):
        state, loss = step(state, batch)
        losses.append(loss)
    return np.array(losses)


def check(names):
    for name in names:
        assert np.isfinite(losses_of(name)).all()
        assert losses_of(name).mean() < 3.5
    for pair in itertools.combinations(names, 2):
        close = np.abs(losses_of(pair[0]) - losses_of(pair[1])).max() < 1e-5
        assert close == (set(pair) in SAME), pair
    np.testing.assert_allclose(losses_of("bfloat16"), losses_of("plain"), rtol=0.05)


@pytest.mark.usefixtures("small_vit")
def test_options_change_the_losses():
    check([name for name in WAYS if name in KEPT])


@pytest.mark.slow
@pytest.mark.usefixtures("small_vit")
def test_all_options_change_the_losses():
    check(list(WAYS))


def test_a_group_of_one_has_no_batch_statistics():
    with pytest.raises(ArgumentError, match="--group-size must be at least 2 for mlp: its batch"):
        experiment_from(Config(devices=1, group_size=1))


def prepared(part=None, **options):
    """A thousand images of ones, augmented and normalized."""
    split = data.Split(np.ones((1000, 32, 32, 1), np.uint8), np.zeros(1000, np.int32))
    mean, std = np.full(1, 3, np.float32), np.full(1, 2, np.float32)
    dataset = data.Dataset(part or split, split, split, 2, (32, 32, 1), mean, std, "made")
    prepare = _prepare(resolve(Config(**options)), dataset)
    return np.asarray(jax.jit(prepare)(jax.random.key(0), split.images))


def test_the_share_of_cutout_is_the_one_asked_for():
    for options, share in (({"cutout": 0.25}, 0.25), ({"cutout": 1.0}, 1.0), ({}, 0.0)):
        # A cut pixel is zero after the normalization.
        cut = prepared(**options) == 0
        assert abs(cut.any((1, 2, 3)).mean() - share) < 0.05
        assert cut.sum((1, 2, 3)).max(initial=0) == (256 if share else 0)


def test_streamed_images_are_not_cropped_again():
    streamed = types.SimpleNamespace(streamed=True)
    assert set(np.unique(prepared(crop_padding=2))) == {-1.5, -1.0}
    assert set(np.unique(prepared(streamed, crop_padding=2))) == {-1.0}


def test_the_schedule_ends_with_the_run():
    experiment = experiment_from(Config(devices=1, method="sgd", epochs=3, train_examples=100))
    assert (experiment.steps_per_epoch, experiment.total_steps) == (3, 9)
    # The schedule ends at zero: the tenth step changes no parameter.
    state = experiment.first_state()
    batch = jax.tree.map(lambda x: x[:32], experiment.train.split)
    step = jax.jit(experiment.step)
    for _ in range(10):
        before = state.params["head"]["kernel"]
        state, _ = step(state, batch)
        moved = np.abs(state.params["head"]["kernel"] - before).max()
        assert (moved > 1e-5) == (state.step < 10)


def test_the_seed_is_that_of_all_random_numbers():
    """No key is used twice, and each depends on the seed."""
    keys, labels = [], []
    for seed in (0, 1):
        config = Config(method="tilted", seed=seed, label_noise=0.5, devices=1)
        experiment = experiment_from(config)
        state = experiment.first_state()
        labels.append(experiment.dataset.train.labels)
        keys += [str(key) for key in (jax.random.key(seed), state.key)]
        (method_key,) = (leaf for leaf in jax.tree.leaves(state.method) if leaf.dtype == np.uint32)
        method_key = jax.random.wrap_key_data(method_key)
        keys += [str(key) for key in (method_key, *keys_of(state))]
        keys += [str(state.params["head"]["kernel"])]
    assert len(set(keys)) == 2 * 7
    assert (labels[0] != labels[1]).any()


def test_cut_squares_have_the_mean():
    """They are cut after normalization."""
    stored = types.SimpleNamespace(streamed=False)
    dataset = types.SimpleNamespace(train=stored, mean=np.full(1, 100.0), std=np.ones(1))
    prepare = _prepare(resolve(Config(cutout=1.0)), dataset)
    images = prepare(jax.random.key(0), np.full((64, 32, 32, 1), 200, np.uint8))
    assert set(np.unique(images)) == {0.0, 100.0}
