"""The same losses on one, two and eight devices, in each of three ways."""

import functools
import itertools
import re

import jax
import numpy as np
import pytest

from experiments import command_line, launches, methods, train
from experiments.config import ArgumentError, Config
from experiments.experiment import Experiment

WAYS = ("jit", "shard_map", "pmap")
STEPS = 4


pytestmark = [pytest.mark.devices, pytest.mark.usefixtures("quick_compilation")]


def experiment(**options):
    # Slowly: a rounding error that turns a unit of a ReLU on or off changes the next losses by
    # about 1e-5 of the learning rate's default, 0.1.
    defaults = {"train_examples": 128, "seed": 1, "epochs": 2, "learning_rate": 0.005}
    return Experiment(Config(**defaults | options))


def trained(**options):
    made, losses = experiment(**options), []
    launch = made.compile()
    state, _ = launches.run(launch, made.state, 0, STEPS, losses.extend)
    return made, launch, state, losses


@functools.cache
def on_one_device(**options):
    made, _, state, losses = trained(devices=1, **options)
    return losses, jax.device_get(state.stats), made


def check(options, **places):
    made, launch, state, losses = trained(**options, **places)
    expected, stats, _ = on_one_device(**options)
    # Where weights or examples are chosen, a rounding error may choose others.
    chooses = options["method"] in ("sparse-fisher", "sparse-dynamic", "efficient")
    np.testing.assert_allclose(losses, expected, rtol=1e-4 if chooses else 3e-6)
    for got, want in zip(jax.tree.leaves(state.stats), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    # What goes in comes out: no launch moves a leaf, or compiles anew.
    before, after = made.state, state
    assert jax.tree.map(lambda x: x.sharding, before) == jax.tree.map(lambda x: x.sharding, after)
    return launch.compiled.as_text()


def few(method):
    """What makes it cheap to compile."""
    return {"sparse": {"update_every": 2}, "tilted": {"num_samples": 2}}.get(method[:6], {})


def all_reduces(program):
    return len(re.findall(r" all-reduce(?:-start)?\(", program))


# Each method in one way; tests/test_front_door.py has every method in every way.
IN_EVERY_WAY = ["bisam-tanh", "sparse-fisher", "efficient", "sampa"]


@pytest.mark.parametrize(
    ("method", "way"),
    {
        **dict.fromkeys(zip(methods.METHODS, itertools.cycle(WAYS), strict=False)),
        **dict.fromkeys(itertools.product(IN_EVERY_WAY, WAYS)),
    },
)
def test_eight_devices(method, way):
    check({"method": method, **few(method)}, devices=8, parallelism=way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["bisam-log", "sampa"])
def test_two_devices(method, way):
    check({"method": method, **few(method)}, devices=2, parallelism=way)


@pytest.mark.parametrize("way", ["jit", "shard_map"])
@pytest.mark.parametrize(
    "options",
    [
        # Of 32 examples 11 are chosen, which 8 devices cannot share evenly.
        {"method": "efficient", "perturbation": "log", "gamma": 0.35},
        {"method": "sampa", "perturbation": "tanh"},
    ],
    ids=["efficient", "sampa"],
)
def test_the_ascended_loss_of_bisam(options, way):
    check(options, devices=8, parallelism=way)


@pytest.mark.parametrize("way", WAYS)
def test_groups(way):
    program = check({"method": "bisam-log", "group_size": 4}, devices=8, parallelism=way)
    # The perturbation is each group's own: gradients are summed once, with all else.
    assert all_reduces(program) == 1


@pytest.mark.parametrize("method", ["sparse-dynamic", "friendly"])
def test_groups_of_a_method_with_state(method):
    for way in ("shard_map", "pmap"):
        check({"method": method, "group_size": 4, "update_every": 2}, devices=8, parallelism=way)


def test_groups_that_are_larger_than_a_device():
    check({"method": "bisam-log", "group_size": 16}, devices=8)


@pytest.mark.parametrize("way", WAYS)
def test_microbatches(way):
    check({"method": "bisam-log", "microbatch_size": 16}, devices=8, parallelism=way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["efficient", "sampa"])
def test_microbatches_of_what_takes_more_than_gradients(method, way):
    check({"method": method, "microbatch_size": 16}, devices=8, parallelism=way)


@pytest.mark.parametrize("way", WAYS)
def test_a_late_start(way):
    options = {"method": "gsam", "perturbation": "log", "start_step": 1, "every": 2}
    check(options, devices=8, parallelism=way)


@pytest.mark.usefixtures("small_vit")
@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_dropout_does_not_depend_on_the_devices(way):
    options = {"model": "vit_tiny", "method": "bisam-tanh"}
    expected = trained(devices=1, **options)[3]
    np.testing.assert_allclose(trained(devices=8, parallelism=way, **options)[3], expected, 3e-6)


def test_augmentation_does_not_depend_on_the_devices():
    check({"method": "sam", "crop_padding": 1, "flip": True, "cutout": 0.5}, devices=8)


@pytest.mark.parametrize("way", ["shard_map", "pmap"])
def test_statistics_of_each_device(way):
    """Those of equal parts have the whole's mean, and on average a smaller variance."""
    _, _, state, losses = trained(
        method="sgd", devices=8, parallelism=way, batch_statistics="per-device"
    )
    expected, stats, _ = on_one_device(method="sgd")
    assert abs(losses[0] - expected[0]) > 1e-3
    first = state.stats["norms"][0], stats["norms"][0]
    np.testing.assert_allclose(first[0]["mean"], first[1]["mean"], rtol=0.2, atol=0.1)
    smaller = np.asarray(first[0]["var"]) < first[1]["var"]
    assert smaller.mean() > 0.9


@pytest.mark.parametrize("method", ["bisam-log", "friendly", "sampa"])
def test_sharded_parameters(method):
    options = {"method": method}
    check(options, devices=8, fsdp=4)
    made = experiment(**options, devices=8, fsdp=4)
    for leaf in jax.tree.leaves((made.state.params, made.state.optimizer)):
        if leaf.ndim == 2 and leaf.size > 1000:
            assert leaf.addressable_shards[0].data.size == leaf.size / 4


def test_a_sharded_convolutional_network():
    check({"method": "bisam-log", "model": "cnn"}, devices=8, fsdp=4)
    options = {"method": "sam", "model": "cnn", "batch_size": 64, "devices": 8}
    assert flops(**options, fsdp=8) < 1.1 * flops(**options)


def test_sharded_parameters_are_never_whole_on_a_device(monkeypatch):
    """Bytes a device: an eighth of one device's, parameters, momentum and what a step needs."""
    from experiments import models

    wide = functools.partial(models.MLP, width=1024)
    monkeypatch.setitem(
        models.ARCHITECTURES, "mlp", models.ARCHITECTURES["mlp"]._replace(module=wide)
    )

    def bytes_of(**options):
        memory = (
            experiment(method="bisam-log", batch_size=8, **options)
            .compile()
            .compiled.memory_analysis()
        )
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    # The data set is whole on every device.
    data_set = 128 * 65
    alone, each = bytes_of(devices=1), bytes_of(devices=8, fsdp=8)
    assert each - data_set < 1.4 * alone / 8


def flops(**options):
    return experiment(**options).compile().compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("devices", [2, 8])
def test_each_half_of_the_devices_has_one_of_sampas_gradients(devices, model):
    options = {"method": "sampa", "model": model, "batch_size": 128}
    # The optimizer's part is not shared.
    assert flops(**options, devices=devices) < 1.4 * flops(**options, devices=1) / devices


@pytest.mark.parametrize("way", WAYS)
def test_groups_of_a_convolutional_network_are_shared_evenly(way):
    plain = flops(method="sam", model="cnn", batch_size=64, devices=8)
    options = {"method": "sam", "model": "cnn", "batch_size": 64, "group_size": 8}
    assert flops(**options, devices=8, parallelism=way) < 1.2 * plain


def test_evaluation_on_eight_devices():
    for name in ("train", "validation", "test"):
        results = []
        for devices in (1, 8):
            made = experiment(devices=devices)
            split = getattr(made.dataset, name)
            results.append(made.evaluate(made.state.params, made.state.stats, split))
        assert results[0].accuracy == results[1].accuracy
        np.testing.assert_allclose(results[0].loss, results[1].loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 9}, "--devices must be at most the 8 there are, got 9"),
        ({"batch_size": 20}, "--batch-size must be a multiple of 8.*got 20: use 16, or fewer"),
        ({"fsdp": 3}, "--fsdp must divide the number of devices, got 3 and 8"),
        ({"fsdp": 2, "parallelism": "pmap"}, "--fsdp needs --parallelism jit, got pmap"),
        (
            {"group_size": 8, "parallelism": "shard_map"},
            "--group-size must divide the 4 examples of each of 8 devices.*got 8: use .*jit",
        ),
        (
            {"microbatch_size": 4, "parallelism": "pmap"},
            "--microbatch-size must be a multiple of 8.*got 4",
        ),
        ({"batch_statistics": "per-device"}, "--batch-statistics per-device needs --parallelism"),
        (
            {"batch_statistics": "per-device", "parallelism": "pmap", "batch_size": 8},
            "--batch-statistics per-device needs 2 examples on each of 8",
        ),
        (
            {"method": "efficient", "gamma": 0.25, "parallelism": "shard_map"},
            "--method efficient needs 2 examples on each of 8 devices at a time",
        ),
        (
            {"method": "sparse-fisher", "batch_size": 8, "parallelism": "pmap"},
            "--method sparse-fisher needs 2 examples on each of 8 devices at a time",
        ),
        (
            {"batch_statistics": "per-device", "parallelism": "pmap", "group_size": 4},
            "per-device has no meaning with --group-size",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        experiment(**options)


def test_a_run_goes_on_in_another_way(tmp_path):
    """Also in the ways that are the default."""
    run = tmp_path / "run"
    args = ["--train-examples", "128", "--epochs", "1", "--output", str(run)]
    train.main([*args, "--parallelism", "shard_map", "--devices", "4"])
    asked = ["--parallelism", "jit", "--devices", "2", "--fsdp", "1"]
    arguments = command_line.parse(train.Arguments, "", ["--resume", str(run), *asked])
    config = train._config_of(arguments)
    assert (config.parallelism, config.devices, config.fsdp) == ("jit", 2, 1)
    as_it_was = train._config_of(command_line.parse(train.Arguments, "", ["--resume", str(run)]))
    assert (as_it_was.parallelism, as_it_was.devices) == ("shard_map", 4)
