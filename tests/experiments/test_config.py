"""What a configuration becomes."""

import dataclasses
import inspect
import json
import math
import re
import typing
from pathlib import Path

import pytest

from experiments import methods, train
from experiments.config import ArgumentError, Config
from experiments.presets import PRESETS


def resolved(**values):
    return Config(**values, output=Path("x")).resolved()


def test_defaults_are_of_the_method_the_optimizer_and_the_data():
    config = resolved(method="bisam-tanh", mu=3.0)
    assert (config.rho, config.mu, config.alpha, config.eta) == (0.05, 3.0, 0.1, None)
    assert (config.model, config.epochs, config.batch_size, config.flip) == ("mlp", 50, 32, False)
    plain = resolved(method="sgd", rho=0.1, base="adamw")
    assert (plain.rho, plain.momentum, plain.learning_rate) == (None, None, 2e-3)
    cifar = resolved(dataset="cifar10:3.0.2", epochs=3)
    assert (cifar.model, cifar.epochs, cifar.batch_size) == ("resnet20", 3, 128)
    assert (cifar.crop_padding, cifar.flip, cifar.cutout) == (4, True, 0.0)


def test_what_is_given_wins_over_every_default():
    given = {"crop_padding": 0, "flip": False, "cutout": 0.0, "weight_decay": 0.0, "model": "cnn"}
    config = resolved(dataset="cifar10", **given)
    assert {name: getattr(config, name) for name in given} == given


def test_checkpoints_are_an_epoch_apart():
    assert resolved(dataset="cifar10").with_epochs_of(351).checkpoint_every == 351
    assert resolved().with_epochs_of(39).checkpoint_every == 390
    assert resolved(checkpoint_every=5).with_epochs_of(39).checkpoint_every == 5


def test_an_interval_is_the_methods():
    assert resolved(method="sparse-fisher").update_every == 1
    assert resolved(method="sparse-fisher", update_every=5).update_every == 5
    assert resolved(method="sam", update_every=5).update_every is None


@pytest.mark.parametrize("name", methods.METHODS)
def test_defaults_are_the_librarys(name):
    spec, config = methods.METHODS[name], resolved(method=name)
    parameters = inspect.signature(spec.factory).parameters
    own = {option for option in spec.defaults if getattr(config, option) is not None}
    assert own == set(spec.options)
    for option, argument in spec.options.items():
        assert getattr(config, option) == parameters[argument].default
        assert getattr(config, option) in methods.HYPERPARAMETERS[option].range
    elsewhere = {*methods.PERTURBATIONS[config.perturbation], *methods.BASE_OPTIMIZERS["sgd"]}
    for option in set(methods.HYPERPARAMETERS) - own - elsewhere:
        assert getattr(config, option) is None
    if spec.is_case_of is not None:
        assert methods.METHODS[spec.is_case_of].options == spec.options


def test_every_hyperparameter_is_an_option_with_its_range_and_help(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    for name, known in methods.HYPERPARAMETERS.items():
        option, number = f"--{name.replace('_', '-')}", int if known.is_count else float
        assert f"{option} {{None}}|{number.__name__.upper()} {methods.help_of(name)}" in out
        assert typing.get_args(types[name])[0] == number | None
        for bound in (known.range.minimum - 1, known.range.maximum + 1):
            if abs(bound) < math.inf:
                with pytest.raises(ArgumentError, match=f"{option} must be finite"):
                    Config(**{name: bound})
    assert methods.help_of("rho") == "Radius of the perturbation (default 0.05; asam 0.5)."
    assert methods.help_of("gamma").startswith("efficient: share of the examples to descend on")


@pytest.mark.parametrize(
    ("range_", "inside", "outside"),
    [
        (methods.Range(0, 1), (0, 0.5, 1), (-0.1, 1.1)),
        (methods.Range(0, 1, above=True), (0.5, 1), (0, 1.1)),
        (methods.Range(0, 1, below=True), (0, 0.5), (-0.1, 1)),
        (methods.Range(1), (1, 1e9), (0.9,)),
    ],
)
def test_ranges(range_, inside, outside):
    assert all(value in range_ for value in inside)
    assert not any(value in range_ for value in outside)


def test_options_of_a_perturbation():
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
    for method in methods.METHODS:
        assert resolved(method=method, microbatch_size=8).microbatch_size == 8
    with pytest.raises(ArgumentError, match="--gamma leaves less than 2 examples of --group-size"):
        resolved(method="efficient", group_size=2)


def test_bad_values_name_the_argument():
    with pytest.raises(ArgumentError, match="--epochs"):
        Config(epochs=0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_recipe(name):
    method, _, dataset = name.rpartition("-")
    config = PRESETS[name].resolved()
    assert config.dataset == dataset
    assert (config.epochs, config.batch_size, config.base) == (200, 128, "sgd")
    assert (config.learning_rate, config.momentum, config.weight_decay) == (0.1, 0.9, 5e-4)
    assert (config.label_smoothing, config.crop_padding, config.flip) == (0.1, 4, True)
    assert config.cutout == 0.5
    rho = {"cifar10": 0.05, "cifar100": 0.1}[dataset]
    expected = {
        "sgd": ("sgd", None, None, None),
        "sam": ("sam", rho, None, None),
        "bisam": ("bisam-log", rho, 1.0, None),
        "bisam-tanh": ("bisam-tanh", rho, 10.0, 0.1),
    }
    assert (config.method, config.rho, config.mu, config.alpha) == expected[method]


def test_a_preset_is_a_start_for_the_command_line(tmp_path, capsys):
    """Its values are overridden, saved and printed."""
    options = ["--dataset", "digits", "--model", "mlp", "--epochs", "1", "--crop-padding", "1"]
    output = ["--output", str(tmp_path / "run")]
    train.main(["--rho", "0.2", "--preset", "bisam-tanh-cifar100", *options, *output])
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["method"], saved["rho"], saved["mu"]) == ("bisam-tanh", 0.2, 10.0)
    assert (saved["epochs"], saved["batch_size"], saved["cutout"]) == (1, 128, 0.5)
    for text in ("method=bisam-tanh", "rho=0.2", "epochs=1", "cutout=0.5"):
        assert f" {text} " in out


def test_help_shows_a_presets_values(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--preset", "sam-cifar100", "--help"])
    assert not exit_.value.code
    out = capsys.readouterr().out
    assert "--preset NAME" in out
    assert "resnet56" in out
    assert "bisam-cifar10" in out
