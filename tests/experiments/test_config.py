"""What a configuration becomes."""

import json
from pathlib import Path

import pytest

from experiments import train
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


def test_intervals_are_an_epoch():
    config = resolved(method="sparse-fisher", dataset="cifar10")
    assert config.update_every is None
    config = config.with_epochs_of(351)
    assert (config.update_every, config.checkpoint_every) == (351, 351)
    assert resolved(method="sparse-fisher", update_every=5).with_epochs_of(39).update_every == 5
    assert resolved(method="sam", update_every=5).with_epochs_of(39).update_every is None


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
