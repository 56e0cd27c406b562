"""Runs on texts: they learn, resume, and keep their tokenizer."""

import shutil

import chex
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import compare
from experiments.config.config import Config
from experiments.data import DatasetError, tokens
from experiments.run.folder import read_config
from experiments.run.restoring import accuracy_and_loss, restore
from experiments.run.training import experiment_from, train
from experiments.system.command_line import ArgumentError
from tests.experiments import tiny_dataset
from tests.experiments.rows import read_csv
from tests.experiments.run.runs import rows_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset.write_texts(folder)
    return folder


def config(folder, output, **options):
    defaults = {"dataset": "texts", "model": "text-bag", "flip": False, "max_length": 16}
    defaults |= {"epochs": 8, "batch_size": 6, "devices": 1, "learning_rate": 0.02}
    return Config(data_dir=folder, output=output, **defaults | options)


def no_fit(*args):
    raise AssertionError("a tokenizer is fitted")


def test_a_run_learns_and_its_tokenizer_is_kept(folder, tmp_path, monkeypatch):
    summary = train(config(folder, tmp_path / "run"))
    assert summary["test_accuracy"] == 1.0
    monkeypatch.setattr(tokens, "_fitted", no_fit)
    restored = restore(tmp_path / "run")
    assert accuracy_and_loss(restored.experiment, restored.state)["test"]["accuracy"] == 1.0


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(folder, tmp_path, stopped_at, monkeypatch):
    options = {"method": "sampa", "perturbation": "log", "epochs": 3}
    train(config(folder, tmp_path / "whole", **options))
    with stopped_at(8):
        summary = train(config(folder, tmp_path / "stopped", **options))
    assert summary["status"] == "interrupted"
    monkeypatch.setattr(tokens, "_fitted", no_fit)
    train(read_config(tmp_path / "stopped"), tmp_path / "stopped")
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "cnn"}, "--model cnn reads images, which texts has not: use text-bag"),
        (
            {"flip": True},
            "--flip has no meaning for texts, which has texts, not images: add --no-flip",
        ),
        ({"dataset": "digits", "max_length": None}, "--model text-bag reads texts, which digits"),
        ({"dataset": "reuters_r8", "flip": True}, "--flip has no meaning for reuters_r8, which"),
        ({"base": "adamw", "momentum": 0.5}, "--momentum has no meaning for"),
        ({"method": "adversarial-l2"}, "attacks pixels, and texts has texts, not images"),
    ],
    ids=["images", "flip", "texts", "known texts", "momentum", "attack"],
)
def test_what_does_not_fit_texts(options, message, folder, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        experiment_from(config(folder, tmp_path / "run", **options))


def test_a_run_starts_from_another_one_with_other_classes(folder, tmp_path):
    """With its encoder and its tokenizer, but a last layer of its own."""
    train(config(folder, tmp_path / "first", method="sgd", epochs=2))
    three = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3)}
    rows = [{"text": f"new {'abc'[n % 3]} good", "label": n % 3} for n in range(40)]
    tiny_dataset.build(folder, "three", three, {"train": rows, "test": rows[:9]})
    earlier = {"tokenizer": str(tmp_path / "first" / "tokenizer.json")}
    options = {"dataset": "three", "from_checkpoint": str(tmp_path / "first"), "epochs": 1}
    options |= earlier
    new = experiment_from(config(folder, None, **options))
    state, earlier = new.first_state(), restore(tmp_path / "first").state
    for name in ("embedding", "norm", "hidden"):
        chex.assert_trees_all_equal(state.params[name], earlier.params[name])
    assert state.params["head"]["kernel"].shape == (128, 3)
    assert new.dataset.tokenizer == (tmp_path / "first" / "tokenizer.json").read_text()
    # The run can be evaluated after the earlier one is gone.
    train(config(folder, tmp_path / "second", **options))
    shutil.rmtree(tmp_path / "first")
    restore(tmp_path / "second")
    with pytest.raises(DatasetError, match=r"path of a run's tokenizer\.json, got"):
        experiment_from(config(folder, None, **options))
    options |= {"dataset": "digits", "model": "mlp", "tokenizer": None, "max_length": None}
    with pytest.raises(ArgumentError, match="--from-checkpoint must be a run folder with check"):
        experiment_from(config(folder, None, **options))


@pytest.mark.slow
def test_a_run_with_a_relative_start_is_resumed(folder, tmp_path, stopped_at, monkeypatch):
    """Also from another folder, and after the earlier run is gone."""
    monkeypatch.chdir(tmp_path)
    train(config(folder, tmp_path / "first", epochs=1))
    options = {"from_checkpoint": "first", "epochs": 2, "method": "sgd"}
    options["tokenizer"] = "first/tokenizer.json"
    train(config(folder, tmp_path / "whole", **options))
    with stopped_at(8):
        train(config(folder, tmp_path / "stopped", **options))
    monkeypatch.chdir(folder)
    shutil.rmtree(tmp_path / "first")
    train(read_config(tmp_path / "stopped"), tmp_path / "stopped")
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")


@pytest.mark.slow
def test_another_network_is_no_start(folder, tmp_path):
    train(config(folder, tmp_path / "first", epochs=1))
    start = {"from_checkpoint": str(tmp_path / "first")}
    start["tokenizer"] = str(tmp_path / "first" / "tokenizer.json")
    with pytest.raises(ArgumentError, match="than --model text-transformer: the shape of blocks"):
        experiment_from(config(folder, None, model="text-transformer", **start))
    with pytest.raises(ArgumentError, match=r"embeddings of other tokens: use --tokenizer .+first"):
        experiment_from(config(folder, None, **start | {"tokenizer": "bytes"}))


@pytest.mark.slow
def test_replicas_get_the_numbers_of_runs_by_themselves(folder, tmp_path, monkeypatch):
    """Also if they warm up, and if they start from an earlier run."""
    train(config(folder, tmp_path / "first", epochs=1))
    options = {"learning_rate": 0.02, "from_checkpoint": str(tmp_path / "first"), "epochs": 2}
    options["tokenizer"] = str(tmp_path / "first" / "tokenizer.json")
    train(config(folder, tmp_path / "run", method="sgd", warmup=0.3, **options))
    args = ["--dataset", "texts", "--data-dir", folder, "--model", "text-bag", "--no-flip"]
    args += ["--max-length", 16, "--batch-size", 6, "--methods", "sgd", "--seeds", 2]
    args += ["--warmup", 0.3]
    for name, value in options.items():
        args += [f"--{name.replace('_', '-')}", value]
    compare.main([*map(str, args), "--output", str(tmp_path / "grid")])
    curves = read_csv(tmp_path / "grid" / "curves.csv")
    together = [float(row["validation_loss"]) for row in curves if row["run"] == "0"]
    alone = [float(row["validation_loss"]) for row in rows_of(tmp_path / "run")]
    np.testing.assert_allclose(together, alone, rtol=1e-4)
