"""The same losses on one, two and eight devices, in each of three ways."""

import functools
import re

import jax
import numpy as np
import pytest

from experiments import models
from experiments.config.config import Config
from experiments.models import convolution
from experiments.run.training import experiment_from
from experiments.step.feeds import advance

STEPS = 4


pytestmark = [pytest.mark.devices, pytest.mark.usefixtures("small_mlp")]


def slow(*values, **options):
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def experiment(**options):
    # A small step: a rounding error that turns a unit of a ReLU on or off changes the next losses
    # by about 1e-5 of the default learning rate, 0.1.
    defaults = {"train_examples": 128, "seed": 1, "epochs": 2, "learning_rate": 0.005}
    return experiment_from(Config(**defaults | options))


def launch_of(made):
    return made.train.launch(made.step, made.first_state(), made.recipe.batch_size, 1, 2)


def trained(**options):
    made, losses = experiment(**options), []
    launch = launch_of(made)
    state, _ = advance(launch, made.first_state(), 0, STEPS, losses.extend)
    return made, launch, state, losses


@functools.cache
def on_one_device(**options):
    _, _, state, losses = trained(devices=1, **options)
    return losses, jax.device_get(state.stats)


def check(options, **places):
    made, launch, state, losses = trained(**options, **places)
    expected, stats = on_one_device(**options)
    # Where weights or examples are chosen, a rounding error may choose others.
    chooses = options["method"] in ("sparse-fisher", "sparse-dynamic", "efficient")
    np.testing.assert_allclose(losses, expected, rtol=1e-4 if chooses else 3e-6)
    for got, want in zip(jax.tree.leaves(state.stats), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    # A launch keeps the sharding of every leaf: the next one needs no other program.
    before = made.first_state()
    assert jax.tree.map(lambda x: x.sharding, before) == jax.tree.map(lambda x: x.sharding, state)
    return launch.compiled.as_text()


def all_reduces(program):
    return len(re.findall(r" all-reduce(?:-start)?\(", program))


@pytest.mark.parametrize("way", ["jit", slow("shard_map"), slow("pmap")])
def test_every_way_gives_the_losses_of_one_device(way):
    """Also augmentation and microbatches do not depend on the devices."""
    options = {"method": "bisam-log", "microbatch_size": 16}
    options |= {"crop_padding": 1, "flip": True, "cutout": 0.5}
    check(options, devices=8, parallelism=way)


# The tests of the library have every method in every way.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "way"),
    [("sparse-fisher", "shard_map"), ("efficient", "pmap"), ("sampa", "jit")],
)
def test_methods_that_take_more_than_gradients(method, way):
    check({"method": method}, devices=8, parallelism=way)


@pytest.mark.slow
def test_a_method_with_keys():
    check({"method": "tilted", "num_samples": 2}, devices=8, parallelism="shard_map")


@pytest.mark.slow
def test_two_devices():
    check({"method": "sampa"}, devices=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        # Of 32 examples 11 are chosen, which 8 devices cannot share evenly.
        {"method": "efficient", "perturbation": "log", "gamma": 0.35},
        {"method": "sampa", "perturbation": "tanh"},
    ],
    ids=["efficient", "sampa"],
)
def test_the_ascended_loss_of_bisam(options):
    check(options, devices=8)


@pytest.mark.parametrize("way", ["jit", slow("shard_map"), slow("pmap")])
def test_groups(way):
    program = check({"method": "bisam-log", "group_size": 4}, devices=8, parallelism=way)
    # Every group has its own perturbation: gradients are summed once, with all else.
    assert all_reduces(program) == 1


@pytest.mark.slow
def test_groups_of_a_method_with_state():
    check({"method": "friendly", "group_size": 4}, devices=8, parallelism="pmap")


@pytest.mark.slow
def test_groups_that_are_larger_than_a_device():
    check({"method": "bisam-log", "group_size": 16}, devices=8)


@pytest.mark.slow
def test_microbatches():
    check({"method": "sampa", "microbatch_size": 16}, devices=8, parallelism="shard_map")


@pytest.mark.slow
def test_plain_steps():
    options = {"method": "gsam", "perturbation": "log", "start_step": 1, "every": 2}
    check(options, devices=8, parallelism="pmap")


@pytest.mark.slow
@pytest.mark.usefixtures("small_vit")
def test_dropout_does_not_depend_on_the_devices():
    options = {"model": "vit_tiny", "method": "bisam-tanh"}
    expected = trained(devices=1, **options)[3]
    losses = trained(devices=8, parallelism="shard_map", **options)[3]
    np.testing.assert_allclose(losses, expected, 3e-6)


@pytest.mark.parametrize("way", ["shard_map", slow("pmap")])
def test_statistics_of_each_device(way):
    """Those of equal parts have the mean of the whole, and on average a smaller variance."""
    _, _, state, losses = trained(
        method="sgd", devices=8, parallelism=way, batch_statistics="per-device"
    )
    expected, stats = on_one_device(method="sgd")
    assert abs(losses[0] - expected[0]) > 1e-3
    first = state.stats["norms"][0], stats["norms"][0]
    np.testing.assert_allclose(first[0]["mean"], first[1]["mean"], rtol=0.2, atol=0.1)
    smaller = np.asarray(first[0]["var"]) < first[1]["var"]
    assert smaller.mean() > 0.9


@pytest.mark.parametrize("method", ["sgd", slow("bisam-log")])
def test_sharded_parameters(method):
    check({"method": method}, devices=8, fsdp=4)
    state = experiment(method=method, devices=8, fsdp=4).first_state()
    large = [x for x in jax.tree.leaves((state.params, state.optimizer)) if x.size > 1000]
    assert large
    for leaf in large:
        assert leaf.addressable_shards[0].data.size == leaf.size / 4


@pytest.mark.slow
def test_a_sharded_convolutional_network():
    check({"method": "bisam-log", "model": "cnn"}, devices=8, fsdp=4)
    options = {"method": "sam", "model": "cnn", "batch_size": 64, "devices": 8}
    assert flops(**options, fsdp=8) < 1.1 * flops(**options)


@pytest.mark.slow
def test_sharded_parameters_are_never_whole_on_a_device(monkeypatch):
    """Parameters, momentum and temporaries take an eighth of the bytes of one device."""
    wide = functools.partial(models.MLP, width=1024)
    known = models.ARCHITECTURES["mlp"]._replace(module=wide)
    monkeypatch.setitem(models.ARCHITECTURES, "mlp", known)

    def bytes_of(**options):
        launch = launch_of(experiment(method="bisam-log", batch_size=8, **options))
        memory = launch.compiled.memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    # The data set is whole on every device.
    data_set = 128 * 65
    single, each = bytes_of(devices=1), bytes_of(devices=8, fsdp=8)
    assert each - data_set < 1.4 * single / 8


def flops(**options):
    return launch_of(experiment(**options)).compiled.cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "model"), [(2, "mlp"), (8, "cnn")])
def test_each_half_of_the_devices_has_one_of_sampas_gradients(devices, model, monkeypatch):
    # XLA counts the body of a loop once: no convolution in blocks.
    monkeypatch.setattr(convolution, "_BLOCK_NUMBERS", 2**40)
    options = {"method": "sampa", "model": model, "batch_size": 128}
    # The work of the optimizer is not shared.
    assert flops(**options, devices=devices) < 1.4 * flops(**options, devices=1) / devices


@pytest.mark.slow
def test_groups_of_a_convolutional_network_are_shared_evenly():
    plain = flops(method="sam", model="cnn", batch_size=64, devices=8)
    options = {"method": "sam", "model": "cnn", "batch_size": 64, "group_size": 8}
    assert flops(**options, devices=8) < 1.2 * plain


def test_evaluation_on_eight_devices():
    results = []
    for devices in (1, 8):
        made = experiment(devices=devices)
        state = made.first_state()
        feeds = (made.train, made.validation, made.test)
        results.append([made.evaluate(state.params, state.stats, feed) for feed in feeds])
    for single, eight in zip(*results, strict=True):
        assert single.accuracy == eight.accuracy
        np.testing.assert_allclose(single.loss, eight.loss, rtol=1e-5)
