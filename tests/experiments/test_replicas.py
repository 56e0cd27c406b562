"""Replicas get the numbers that their runs get alone."""

import jax
import numpy as np
import pytest

from experiments import capacity, memory, methods
from experiments.config import ArgumentError, Config
from experiments.experiment import Experiment, load
from experiments.launches import run
from experiments.replicas import Labels, Replicas

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPOCHS = 2
# Slowly, so that rounding errors do not grow.
SMALL = {"train_examples": 96, "epochs": EPOCHS, "learning_rate": 0.005, "label_noise": 0.3}


def configs(**options):
    """Two runs that differ in seed, radius and, with label noise, labels."""
    radii = [{}, {}] if options.get("method") == "sgd" else [{"rho": 0.02}, {"rho": 0.5}]
    return [
        Config(**SMALL | radius | options, devices=1, seed=seed).resolved()
        for seed, radius in zip((3, 11), radii, strict=True)
    ]


def alone(config):
    """Losses of the epochs, validation accuracies and losses, test accuracy of the best epoch."""
    experiment = Experiment(config)
    launch, state = experiment.compile(), experiment.state
    steps, rows, best = experiment.steps_per_epoch, [], (-1.0, None)
    for epoch in range(EPOCHS):
        losses = []
        state, _ = run(launch, state, epoch * steps, (epoch + 1) * steps, losses.extend)
        accuracy, loss = experiment.evaluate(
            state.params, state.stats, experiment.dataset.validation
        )
        rows.append((np.mean(losses), accuracy, loss))
        if accuracy >= best[0]:
            test = experiment.evaluate(state.params, state.stats, experiment.dataset.test)
            best = (accuracy, test.accuracy)
    return np.asarray(rows), best[1]


def together(runs, count=None, **options):
    labels = {}
    for config in runs:
        dataset = load(config)
        labels[config.seed] = Labels(dataset.train.labels, dataset.validation.labels)
    program = Replicas(Experiment(runs[0]), count or len(runs), **options)
    inputs = program.inputs(runs, labels)
    population, history = program.first(inputs), []
    for number in range(EPOCHS):
        population, epoch = program.epoch(population, inputs, number)
        history.append(epoch)
    curves = np.moveaxis(np.asarray(history), -1, 0)[: len(runs)]
    return curves, program.test(population)[: len(runs)]


def check(runs, curves, tests):
    """Of runs, the last ones, against the same alone."""
    last = slice(-len(runs), None)
    for config, curve, test in zip(runs, curves[last], tests[last], strict=True):
        expected, expected_test = alone(config)
        # Where weights or examples are chosen, a rounding error may choose others.
        chooses = config.method in ("sparse-fisher", "sparse-dynamic", "efficient")
        rtol = 1e-4 if chooses else 3e-6
        np.testing.assert_allclose(curve[:, [0, 2]], expected[:, [0, 2]], rtol=rtol)
        np.testing.assert_array_equal(curve[:, 1], expected[:, 1])
        assert test == expected_test


@pytest.mark.parametrize("method", methods.METHODS)
def test_two_replicas_are_the_two_runs_alone(method):
    few = {"sparse": {"update_every": 2}, "tilted": {"num_samples": 2}}.get(method[:6], {})
    runs = configs(method=method, **few)
    curves, tests = together(runs)
    assert (abs(curves[0] - curves[1]) > 1e-4).any()
    # What is another program alone takes long to compile: of most, the second run stands for both.
    check(runs if method in ("sgd", "bisam-log") else runs[1:], curves, tests)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gsam", "perturbation": "tanh", "base": "adamw"},
        {"method": "sam", "group_size": 8, "crop_padding": 1, "cutout": 0.5},
        {"method": "bisam-log", "microbatch_size": 16, "flip": True},
        {"method": "gsam", "start_step": 2, "every": 3},
    ],
    ids=["adamw", "groups", "microbatches", "now and then"],
)
def test_whatever_is_trained(options):
    runs = configs(**options)
    check(runs[1:], *together(runs))


def test_a_step_that_is_plain_costs_one_gradient_among_replicas_too():
    programs = []
    for options in ({}, {"start_step": 2}):
        experiment = Experiment(configs(method="sam", **options)[0])
        programs.append(Replicas(experiment, 2)._launch.as_text())
    always, late = (program.count(" conditional(") for program in programs)
    assert (always, late) == (0, 1)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_one_on_each_device(model):
    runs = configs(model=model, method="bisam-log")
    check(runs[1:], *together(runs, at_once=False, devices=jax.devices()[:2]))


def test_the_last_launch_of_an_epoch_may_be_shorter(monkeypatch):
    runs = configs(method="bisam-log")
    expected = together(runs)
    # Of three steps.
    monkeypatch.setattr("experiments.experiment.STEPS_AT_ONCE", 2)
    for result, other in zip(together(runs), expected, strict=True):
        np.testing.assert_allclose(result, other, rtol=1e-6)


def test_replicas_over_devices_and_places_that_are_filled_up():
    runs = configs(method="bisam-log")
    check(runs, *together(runs, count=8, devices=jax.devices()[:4]))


def test_every_hyperparameter_that_can_be_traced_is():
    """Or two replicas would both have the first one's."""
    changed = {
        "rho": 0.3, "mu": 4.0, "alpha": 0.4, "eta": 0.5, "gsam_alpha": 0.9, "rho_min": 0.3,
        "tilt": 30.0, "noise_radius": 0.1, "noise_scale": 0.001, "interpolation": 0.8,
        "sigma": 0.2, "decay": 0.2, "look_alpha": 0.1, "sharpness_weight": 0.2,
        "learning_rate": 0.02, "momentum": 0.5, "weight_decay": 0.2,
    }  # fmt: skip
    of_methods = {
        "eta": "asam", "gsam_alpha": "gsam", "rho_min": "bilateral", "tilt": "tilted",
        "noise_radius": "tilted", "noise_scale": "tilted", "interpolation": "sampa",
        "sigma": "friendly", "decay": "friendly", "look_alpha": "look",
        "sharpness_weight": "weighted",
    }  # fmt: skip
    names = set(methods.HYPERPARAMETERS) - set(methods.STRUCTURAL)
    assert names == set(changed)
    for method in {"bisam-tanh", *of_methods.values()}:
        mine = [n for n in changed if of_methods.get(n, "bisam-tanh") == method]
        options = {**SMALL, "method": method, "devices": 1, "epochs": 1}
        runs = [Config(**options).resolved()]
        runs += [Config(**options | {name: changed[name]}).resolved() for name in mine]
        experiment = Experiment(runs[0])
        program = Replicas(experiment, len(runs))
        labels = {0: Labels(experiment.dataset.train.labels, experiment.dataset.validation.labels)}
        inputs = program.inputs(runs, labels)
        _, epoch = program.epoch(program.first(inputs), inputs, 0)
        for name, loss in zip(mine, epoch.validation_loss[1:], strict=True):
            assert abs(loss - epoch.validation_loss[0]) > 1e-6, (method, name)


def test_as_many_at_once_as_fit(monkeypatch):
    experiment = Experiment(configs(method="sgd")[0])
    many = capacity.program(experiment, 64, None)
    assert many.count == capacity.AT_ONCE_ON_CPU * jax.local_device_count()
    assert capacity.program(experiment, 3, None).count == 3
    # Parts as even as can be.
    assert capacity.program(experiment, 10, 9).count == 5
    # Never more than the limit, and as many on each of eight devices.
    assert capacity.program(experiment, 9, 9).count == 8
    each = many.bytes / many.count * jax.local_device_count()
    free = 20.5 * each / capacity.SHARE_OF_MEMORY
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    assert capacity.program(experiment, 64, None).count == 16
    with pytest.raises(ArgumentError, match=r"--replicas-at-once 64 is too many.*at most 16 fit"):
        capacity.program(experiment, 64, 64)
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    with pytest.raises(ArgumentError, match="not one fits"):
        capacity.program(experiment, 64, None)


def test_convolutions_are_one_by_one_on_cpu():
    experiment = Experiment(configs(model="cnn")[0])
    program = capacity.program(experiment, 20, None)
    assert not program.at_once
    assert program.count == jax.local_device_count()
