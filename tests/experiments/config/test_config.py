"""Options: their ranges, their help, their presets."""

import dataclasses
import math
import re
import typing
from pathlib import Path

import pytest

from experiments import train
from experiments.config import methods
from experiments.config.config import Config, option_of
from experiments.config.hyperparameters import HYPERPARAMETERS, STRUCTURAL, Range
from experiments.config.presets import PRESETS
from experiments.config.recipe import resolve
from experiments.system.command_line import ArgumentError


@pytest.fixture(scope="module")
def help_text():
    """The text of `--help` without boxes and line breaks."""
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("sys.stdout.write", printed.append)
        with pytest.raises(SystemExit):
            train.main(["--help"])
    return " ".join(re.sub("[│─╭╮╰╯]", " ", "".join(printed)).split())


def test_every_hyperparameter_is_an_option_with_its_range_and_help(help_text):
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    assert "None" not in help_text
    for name, known in HYPERPARAMETERS.items():
        number = int if known.is_count else float
        usage = f"{option_of(name)} {number.__name__.upper()} {methods.help_of(name)}"
        assert usage in help_text
        assert typing.get_args(types[name])[0] == number | None
        for bound in (known.range.minimum - 1, known.range.maximum + 1, math.nan, 1e39):
            if bound > -math.inf:
                with pytest.raises(ArgumentError, match=f"{option_of(name)} must be finite"):
                    Config(**{name: bound})
    assert methods.help_of("rho") == "Radius of the perturbation (default 0.05; asam 0.5)."
    assert methods.help_of("gamma").startswith("efficient: share of the examples to descend on")
    assert {"num_samples", "gamma", "look_every"} <= set(STRUCTURAL)
    assert not {"rho", "learning_rate"} & set(STRUCTURAL)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs must be finite, at least 1, got 0"),
        ({"train_examples": 0}, "--train-examples must be finite, at least 1"),
        ({"image_size": 0}, "--image-size must be finite, at least 1"),
        ({"every": 0}, "--every must be finite, at least 1, got 0"),
        ({"start_step": -1}, "--start-step must be finite, at least 0, got -1"),
        ({"batch_size": 1}, "--batch-size must be finite, at least 2"),
        ({"group_size": 0}, "--group-size must be finite, at least 1"),
        ({"microbatch_size": 1}, "--microbatch-size must be finite, at least 2"),
        ({"checkpoint_every": 0}, "--checkpoint-every must be finite, at least 1"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints must be finite, at least 1"),
        ({"devices": 0}, "--devices must be finite, at least 1"),
        ({"fsdp": 0}, "--fsdp must be finite, at least 1"),
        ({"crop_padding": -1}, "--crop-padding must be finite, at least 0"),
        ({"workers": -1}, "--workers must be finite, at least 0"),
        ({"label_noise": 1.5}, "--label-noise must be finite, at least 0 and at most 1, got 1.5"),
        ({"label_smoothing": 2.0}, "--label-smoothing must be finite"),
        ({"cutout": 2.0}, "--cutout must be finite, at least 0 and at most 1"),
        ({"seed": -1}, "--seed must be finite, at least 0"),
        ({"seed": 2**32}, "--seed must be finite, at least 0 and at most"),
        ({"perturbation": "tanh"}, "--perturbation tanh contradicts --method bisam-log: use"),
    ],
    ids=str,
)
def test_values_out_of_range_name_the_option(values, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        Config(**values)


@pytest.mark.parametrize(
    ("range_", "inside", "outside"),
    [
        (Range(0, 1), (0, 0.5, 1), (-0.1, 1.1)),
        (Range(0, 1, above=True), (0.5, 1), (0, 1.1)),
        (Range(0, 1, below=True), (0, 0.5), (-0.1, 1)),
        (Range(1), (1, 1e9), (0.9, math.inf, math.nan, 1e39)),
        (Range(), (-1e9, 0), (-math.inf, math.inf, -1e39)),
    ],
    ids=["both", "above", "below", "from 1", "all"],
)
def test_ranges(range_, inside, outside):
    assert all(value in range_ for value in inside)
    assert not any(value in range_ for value in outside)


def test_the_data_are_requested_as_the_options_say():
    folder = Path("data")
    values = {"train_examples": 7, "label_noise": 0.2, "image_size": 9, "workers": 3}
    values |= {"max_length": 11, "tokenizer": "bytes", "vocabulary_size": 300}
    source = Config(dataset="mnist", seed=1, data_dir=folder, **values).source(5)
    assert dataclasses.asdict(source) == {"name": "mnist", "seed": 5, "data_dir": folder} | values


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_recipe(name):
    method, _, dataset = name.rpartition("-")
    recipe = resolve(PRESETS[name])
    assert (recipe.dataset, recipe.model) == (dataset, "resnet56")
    assert (recipe.epochs, recipe.batch_size, recipe.base) == (200, 128, "sgd")
    known = recipe.hyperparameters
    assert (known["learning_rate"], known["momentum"], known["weight_decay"]) == (0.1, 0.9, 5e-4)
    assert (recipe.label_smoothing, recipe.crop_padding, recipe.flip) == (0.1, 4, True)
    assert recipe.cutout == 0.5
    rho = {"cifar10": 0.05, "cifar100": 0.1}[dataset]
    expected = {
        "sgd": ("sgd", None, None, None),
        "sam": ("sam", rho, None, None),
        "bisam": ("bisam-log", rho, 1.0, None),
        "bisam-tanh": ("bisam-tanh", rho, 10.0, 0.1),
    }
    assert (recipe.method, *map(known.get, ("rho", "mu", "alpha"))) == expected[method]
