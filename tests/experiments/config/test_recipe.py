"""Recipes: every default filled in, every contradiction refused."""

import dataclasses
import inspect
from pathlib import Path

import pytest

from experiments.config import methods
from experiments.config.config import Config
from experiments.config.hyperparameters import HYPERPARAMETERS
from experiments.config.methods import METHODS
from experiments.config.recipe import Recipe, differences, filled_in, resolve
from experiments.system.command_line import ArgumentError


def resolved(**values):
    return resolve(Config(**values))


def test_defaults_are_of_the_method_the_optimizer_and_the_data():
    recipe = resolved(method="bisam-tanh", mu=3.0)
    sgd = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    assert recipe.hyperparameters == {"rho": 0.05, "mu": 3.0, "alpha": 0.1} | sgd
    assert (recipe.model, recipe.epochs, recipe.batch_size, recipe.flip) == ("mlp", 50, 32, False)
    assert (recipe.perturbation, recipe.group_size, recipe.microbatch_size) == ("tanh", 32, 32)
    plain = resolved(method="sgd", base="adamw")
    assert plain.hyperparameters == {"learning_rate": 2e-3, "weight_decay": 1e-2, "warmup": 0.05}
    assert (plain.perturbation, plain.label) == ("ce", "sgd")


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("digits", ("mlp", 50, 32, 0, False, 0.0)),
        ("mnist", ("resnet20", 200, 128, 2, False, 0.0)),
        ("svhn_cropped", ("resnet20", 200, 128, 4, False, 0.0)),
        ("fashion_mnist", ("resnet20", 200, 128, 2, True, 0.0)),
        ("cifar10:3.0.2", ("resnet20", 200, 128, 4, True, 0.0)),
        ("cifar100", ("resnet20", 200, 128, 4, True, 0.0)),
        ("imagenette/full-size-v2", ("resnet20", 200, 128, 0, True, 0.0)),
    ],
)
def test_defaults_of_data_sets(dataset, expected):
    recipe = resolved(dataset=dataset)
    names = ("model", "epochs", "batch_size", "crop_padding", "flip", "cutout")
    assert tuple(getattr(recipe, name) for name in names) == expected
    given = {"crop_padding": 0, "flip": False, "cutout": 0.0, "model": "cnn", "epochs": 3}
    recipe = resolved(dataset=dataset, **given)
    assert {name: getattr(recipe, name) for name in given} == given


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_the_librarys(name):
    spec, recipe = METHODS[name], resolved(method=name)
    parameters = inspect.signature(spec.factory).parameters
    known = dict(recipe.hyperparameters)
    for option, argument in spec.options.items():
        assert known[option] == parameters[argument].default
        assert known.pop(option) in HYPERPARAMETERS[option].range
    expected = methods.PERTURBATIONS[recipe.perturbation] | methods.BASE_OPTIMIZERS["sgd"]
    assert known == expected
    if spec.is_case_of is not None:
        assert METHODS[spec.is_case_of].options == spec.options


def test_the_saved_options_are_those_of_the_recipe():
    config = Config(method="sparse-fisher", update_every=5, weight_decay=0.0, seed=3)
    recipe = resolve(config)
    saved = filled_in(config, recipe)
    # mu has no meaning here.
    assert (saved.update_every, saved.mu, saved.weight_decay) == (5, None, 0.0)
    for field in dataclasses.fields(Recipe):
        if field.name != "hyperparameters":
            assert getattr(saved, field.name) == getattr(recipe, field.name)
    assert resolve(saved) == recipe


def test_an_option_without_a_meaning_is_refused():
    for values, message in (
        ({"method": "sparse-fisher", "mu": 2.0}, "--mu has no meaning for --method sparse-fisher"),
        ({"method": "sgd", "rho": 0.1}, "--rho has no meaning for --method sgd"),
        ({"base": "adamw", "momentum": 0.5}, "--momentum has no meaning .* --base adamw, which"),
        ({"method": "sgd", "perturbation": "tanh"}, "--perturbation tanh has no meaning"),
    ):
        with pytest.raises(ArgumentError, match=message):
            resolved(**values)


def test_differences_are_told_from_the_defaults_of_method_and_data():
    assert differences(Config(output=Path("here"))) == []
    assert differences(Config(rho=0.05, epochs=50)) == []
    told = differences(Config(dataset="cifar10", method="asam", rho=0.05, devices=2))
    assert told == [
        ("--dataset", "cifar10", "digits"),
        ("--rho", "0.05", "0.5"),
        ("--devices", "2", "-"),
        ("--method", "asam", "bisam-log"),
    ]
    assert differences(Config(batch_size=64)) == [("--batch-size", "64", "32")]


def test_the_key_of_a_recipe_tells_runs_of_a_task_apart():
    recipe = resolved(method="sam", rho=1)
    assert recipe.key == resolved(method="sam", rho=1.0).key
    assert recipe.key[:2] == ("sam", 50)
    assert resolved(method="sam", perturbation="log").label == "bisam-log"
    assert resolved(method="asam", perturbation="log").label == "asam+log"
    for other in ({"rho": 2.0}, {"rho": 1.0, "seed": 1}, {"rho": 1.0, "epochs": 51}):
        assert resolved(method="sam", **other).key != recipe.key


def test_gradients_per_step():
    assert resolved(method="sgd").gradients_per_step(100) == 1
    assert resolved(method="bisam-log").gradients_per_step(100) == 2
    assert resolved(method="gsam").gradients_per_step(100) == 2
    assert resolved(method="gsam", perturbation="log").gradients_per_step(100) == 3
    assert resolved(method="tilted", num_samples=3).gradients_per_step(100) == 6
    assert resolved(method="look", look_every=4).gradients_per_step(100) == 1.25
    # Plain steps cost one gradient: perturbed are 20, 24, ..., 96.
    late = resolved(method="bisam-log", start_step=20, every=4)
    assert late.gradients_per_step(100) == pytest.approx(1.2)
    assert resolved(method="sam", start_step=60).gradients_per_step(50) == 1


def test_options_of_perturbed_steps():
    message = "cannot be used with --method sampa, which contains the base optimizer"
    for option, values in (
        ("--group-size", {"group_size": 8}),
        ("--start-step", {"start_step": 20}),
        ("--every", {"every": 2}),
    ):
        with pytest.raises(ArgumentError, match=f"{option} {message}"):
            resolved(method="sampa", **values)
        with pytest.raises(ArgumentError, match=f"{option} has no meaning for --method sgd"):
            resolved(method="sgd", **values)
        resolved(method="look", **values)
    for method in METHODS:
        assert resolved(method=method, microbatch_size=8).microbatch_size == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 3}, "--group-size must divide --batch-size, got 3 and 32"),
        ({"microbatch_size": 5}, "--microbatch-size must divide --batch-size, got 5 and 32"),
        (
            {"group_size": 8, "microbatch_size": 4},
            "--microbatch-size must be a multiple of --group-size, got 4 and 8",
        ),
        (
            {"method": "efficient", "gamma": 0.01},
            "--gamma leaves less than 2 examples of --batch-size",
        ),
        (
            {"method": "efficient", "group_size": 2},
            "--gamma leaves less than 2 examples of --group-size",
        ),
    ],
    ids=["group", "microbatch", "both", "efficient", "efficient group"],
)
def test_sizes_that_do_not_fit_each_other(values, message):
    with pytest.raises(ArgumentError, match=message):
        resolved(**values)
