"""Replicas get the numbers that separate runs get."""

import dataclasses
import functools
import re
import types

import jax
import numpy as np
import pytest

from experiments import data
from experiments.comparison import replicas
from experiments.comparison.replicas import Replicas, inputs_of, labels_of
from experiments.config.config import Config, Place
from experiments.config.hyperparameters import HYPERPARAMETERS, STRUCTURAL
from experiments.config.recipe import resolve
from experiments.models import convolution
from experiments.run.experiment import experiment_of
from experiments.step.feeds import advance
from experiments.step.layout import layout_of

with_small_mlp = pytest.mark.usefixtures("small_mlp")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


EPOCHS = 2
# Slowly, so that rounding errors do not grow.
SMALL = {"train_examples": 96, "epochs": EPOCHS, "learning_rate": 0.005, "label_noise": 0.3}


def configs(**options):
    """Two runs that differ in seed, radius and, with label noise, labels."""
    radii = [{}, {}] if options.get("method") == "sgd" else [{"rho": 0.02}, {"rho": 0.5}]
    return [
        Config(**SMALL | radius | options, seed=seed)
        for seed, radius in zip((3, 11), radii, strict=True)
    ]


@functools.cache
def dataset_of(seed):
    return data.load(Config(**SMALL).source(seed))


def experiment_from(config):
    recipe = resolve(config)
    return experiment_of(recipe, dataset_of(config.seed), layout_of(recipe, Place(devices=1)))


@functools.cache
def separately(config):
    """Losses of the epochs, validation accuracies and losses, test accuracies of best and last."""
    experiment = experiment_from(config)
    state, steps = experiment.first_state(), experiment.steps_per_epoch
    launch = experiment.train.launch(
        experiment.step, state, experiment.recipe.batch_size, config.seed, EPOCHS
    )
    rows, best = [], (-1.0, None)
    for epoch in range(EPOCHS):
        losses = []
        state, _ = advance(launch, state, epoch * steps, (epoch + 1) * steps, losses.extend)
        found = experiment.evaluate(state.params, state.stats, experiment.validation)
        rows.append((np.mean(losses), found.accuracy, found.loss))
        if found.accuracy >= best[0]:
            test = experiment.evaluate(state.params, state.stats, experiment.test)
            best = (found.accuracy, test.accuracy)
    last = experiment.evaluate(state.params, state.stats, experiment.test)
    return np.asarray(rows), [best[1], last.accuracy]


def together(runs, count=None, **options):
    labels = {config.seed: labels_of(dataset_of(config.seed)) for config in runs}
    program = Replicas(experiment_from(runs[0]), count or len(runs), **options)
    inputs = program.inputs([resolve(config) for config in runs], labels)
    population, history = program.first(inputs), []
    for number in range(EPOCHS):
        population, epoch = program.epoch(population, inputs, number)
        history.append(epoch)
    curves = np.moveaxis(np.asarray(history), -1, 0)[: len(runs)]
    return curves, program.test(population)[: len(runs)]


def check(runs, curves, tests):
    """Checks the last of some runs against the same runs by themselves."""
    last = slice(-len(runs), None)
    for config, curve, test in zip(runs, curves[last], tests[last], strict=True):
        expected, expected_test = separately(config)
        # Where weights or examples are chosen, a rounding error may choose others.
        chooses = config.method in ("sparse-fisher", "sparse-dynamic", "efficient")
        rtol = 1e-4 if chooses else 3e-6
        np.testing.assert_allclose(curve[:, [0, 2]], expected[:, [0, 2]], rtol=rtol)
        np.testing.assert_array_equal(curve[:, 1], expected[:, 1])
        assert test.tolist() == expected_test


@with_small_mlp
@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgd", "tilted", "look"])
def test_two_replicas_are_the_two_separate_runs(method):
    """Also the keys and the state of a method are a replica's own."""
    runs = configs(method=method, **({"num_samples": 2} if method == "tilted" else {}))
    curves, tests = together(runs)
    assert (abs(curves[0] - curves[1]) > 1e-4).any()
    # A separate run is another program: for most methods, the second run stands for both.
    check(runs if method == "sgd" else runs[1:], curves, tests)


@with_small_mlp
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "gsam", "perturbation": "tanh", "base": "adamw"},
        {"method": "sam", "group_size": 8, "crop_padding": 1, "cutout": 0.5},
        {"method": "gsam", "start_step": 2, "every": 3},
    ],
    ids=["adamw", "groups", "now and then"],
)
def test_whatever_is_trained(options):
    runs = configs(**options)
    check(runs[1:], *together(runs))


def test_convolutions_of_replicas_at_once_are_products_on_all_devices(monkeypatch):
    class ProductsError(Exception):
        pass

    def as_products(*args, block_numbers, **options):
        if block_numbers is None:  # on accelerators
            raise ProductsError
        return real(*args, block_numbers=block_numbers, **options)

    real = convolution.as_products
    monkeypatch.setattr(convolution, "as_products", as_products)
    experiment = experiment_from(configs(model="cnn", method="sgd")[0])
    with pytest.raises(ProductsError):
        Replicas(experiment, 2)


@pytest.mark.slow
@with_small_mlp
def test_one_on_each_device():
    runs = configs(method="bisam-log")
    check(runs[1:], *together(runs, at_once=False, devices=jax.devices()[:2]))


@with_small_mlp
def test_replicas_over_devices_in_short_launches_and_places_that_are_filled_up(monkeypatch):
    runs = configs(method="bisam-log")
    with monkeypatch.context() as patch:
        # Of three steps.
        patch.setattr("experiments.run.experiment.STEPS_AT_ONCE", 2)
        found = together(runs, count=4, devices=jax.devices()[:2])
    check(runs, *found)


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [([0.5, 0.7, 0.6], 1), ([0.5, 0.7, 0.7], 2), ([0.7, np.nan, 0.7], 2), ([0.7, 0.5, np.nan], 0)],
    ids=["better", "equal", "equal after no number", "no number"],
)
def test_the_best_epoch_is_kept(accuracies, best):
    population = replicas.Population(None, np.float32(-1), -1, -1)
    for epoch, accuracy in enumerate(accuracies):
        state = types.SimpleNamespace(params=epoch, stats=10 * epoch)
        population = replicas._keep_best(population._replace(state=state), np.float32(accuracy))
    assert (population.params, population.stats) == (best, 10 * best)
    assert population.accuracy == np.float32(accuracies[best])


def test_the_best_and_the_last_parameters_are_tested():
    runs = configs(method="sgd", learning_rate=0.1)
    program = Replicas(experiment_from(runs[0]), 2)
    labels = {config.seed: labels_of(dataset_of(config.seed)) for config in runs}
    inputs = program.inputs([resolve(config) for config in runs], labels)
    first = program.first(inputs)
    untrained = program.test(first)
    np.testing.assert_array_equal(untrained[:, 0], untrained[:, 1])
    stay = jax.tree.map(np.copy, (first.params, first.stats))
    trained, _ = program.epoch(first, inputs, 0)
    best, last = program.test(trained._replace(params=stay[0], stats=stay[1])).T
    np.testing.assert_array_equal(best, untrained[:, 0])
    assert (last > best + 0.1).all()


def test_a_step_that_is_plain_costs_one_gradient_among_replicas_too():
    """Both branches of a condition that replicas differ in would be computed."""
    program = Replicas(experiment_from(configs(method="sam", start_step=2)[0]), 2)
    assert program._launch.as_text().count(" conditional(") == 1
    # What a device holds, at least: the states and best parameters of both, and the images.
    population = jax.eval_shape(program.first, program.example)
    held = sum(x.size * 4 for x in jax.tree.leaves((population.state, population.params)))
    assert held + 96 * 64 < program.bytes < 4 * held


# Together they take every hyperparameter that can be traced.
VARIED = ["bisam-tanh", "asam", "gsam", "bilateral", "tilted", "sampa", "friendly", "look"]
VARIED += ["weighted", "adversarial-linf"]


def recipes_of(method):
    """The defaults, and one run for each change of a hyperparameter that can be traced."""
    first = resolve(Config(**SMALL | {"epochs": 1}, method=method))
    names = [name for name in first.hyperparameters if name not in STRUCTURAL]
    # Half of these would change little: the radius cuts off most of the noise.
    changed = {name: 0.01 + 0.5 * first.hyperparameters[name] for name in names}
    changed |= {"noise_scale": 0.001, "tilt": 30.0}
    recipes = [
        dataclasses.replace(first, hyperparameters={**first.hyperparameters, name: changed[name]})
        for name in names
    ]
    return names, [first, *recipes]


def test_every_hyperparameter_is_varied_here_or_changes_the_program():
    varied = {name for method in VARIED for name in recipes_of(method)[0]}
    assert varied == set(HYPERPARAMETERS) - set(STRUCTURAL)


@pytest.mark.parametrize("method", VARIED)
def test_the_step_depends_on_every_hyperparameter_of_a_replica(method):
    """Or two replicas would both have the first one's. Unused arguments are not in a program."""
    names, (recipe, *_) = recipes_of(method)
    experiment = experiment_of(recipe, dataset_of(0), layout_of(recipe, Place(devices=1)))
    values = inputs_of([recipe], {0: labels_of(dataset_of(0))}).values
    state = jax.eval_shape(experiment.first_state)
    batch = jax.tree.map(lambda x: x[:32], experiment.dataset.train)

    def step(values, state, batch):
        return experiment.step_of({**recipe.hyperparameters, **values})(state, batch)

    values = {name: value[0] for name, value in values.items()}
    text = jax.jit(step).lower(values, state, batch).as_text(debug_info=True)
    assert set(re.findall(r"""loc\("values\['(\w+)'\]""", text)) == set(names)


@pytest.mark.parametrize("method", ["bisam-tanh", slow("gsam")])
def test_every_replica_has_its_own_hyperparameters(method):
    names, recipes = recipes_of(method)
    experiment = experiment_of(recipes[0], dataset_of(0), layout_of(recipes[0], Place(devices=1)))
    program = Replicas(experiment, len(recipes))
    inputs = program.inputs(recipes, {0: labels_of(experiment.dataset)})
    _, epoch = program.epoch(program.first(inputs), inputs, 0)
    for name, loss in zip(names, epoch.validation_loss[1:], strict=True):
        assert abs(loss - epoch.validation_loss[0]) > 1e-6, name
