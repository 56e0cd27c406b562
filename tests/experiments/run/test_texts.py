"""Runs on texts: they learn, resume, and keep their tokenizer."""

import shutil

import chex
import jax
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds

from experiments.config.config import Config
from experiments.data import tokens
from experiments.run.folder import read_config
from experiments.run.restoring import accuracy_and_loss, restore
from experiments.run.training import experiment_from, train
from experiments.step.method import are_decayed, base_optimizer, learning_rate
from experiments.system.command_line import ArgumentError
from tests.experiments import tiny_dataset
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
        ({"flip": True}, "--flip has no meaning for texts, which has texts: add --no-flip"),
        ({"dataset": "digits", "max_length": None}, "--model text-bag reads texts, which digits"),
        ({"dataset": "reuters_r8", "flip": True}, "--flip has no meaning for reuters_r8, which"),
        ({"base": "adamw", "momentum": 0.5}, "--momentum has no meaning for"),
    ],
    ids=["images", "flip", "texts", "known texts", "momentum"],
)
def test_what_does_not_fit_texts(options, message, folder, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        experiment_from(config(folder, tmp_path / "run", **options))


def test_the_learning_rate_grows_and_falls():
    values = {"learning_rate": 0.5, "warmup": 0.1}
    schedule = learning_rate(values, 100)
    steps = np.array([schedule(step) for step in range(101)])
    np.testing.assert_allclose(steps[:11], 0.5 * np.arange(11) / 10, rtol=1e-6)
    expected = 0.25 * (1 + np.cos(np.pi * np.arange(91) / 90))
    np.testing.assert_allclose(steps[10:], expected, rtol=1e-5, atol=1e-8)
    assert learning_rate(values | {"warmup": 0.0}, 100)(0) == 0.5


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_only_matrices_that_are_no_embeddings_decay(name):
    params = {
        "embedding": {"embedding": np.ones((3, 4), np.float32)},
        "positions": np.ones((1, 3, 4), np.float32),
        "head": {"kernel": np.ones((4, 2), np.float32), "bias": np.ones(2, np.float32)},
    }
    decayed = {"embedding": {"embedding": False}, "positions": False}
    decayed["head"] = {"kernel": True, "bias": False}
    assert are_decayed(params) == decayed
    values = {"learning_rate": 0.1, "weight_decay": 0.5, "warmup": 0.0}
    tx = base_optimizer(name, values, 10)
    nothing = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(nothing, tx.init(params), params)
    moved = jax.tree.map(lambda p, u: not np.allclose(p, p + u), params, updates)
    assert moved == decayed
    np.testing.assert_allclose(optax.apply_updates(params, updates)["head"]["kernel"], 0.95)


def test_a_run_starts_from_another_one_with_other_classes(folder, tmp_path):
    """With its encoder and its tokenizer, but a last layer of its own."""
    train(config(folder, tmp_path / "first", method="sgd", epochs=2))
    three = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3)}
    rows = [{"text": f"new {'abc'[n % 3]} good", "label": n % 3} for n in range(40)]
    tiny_dataset.build(folder, "three", three, {"train": rows, "test": rows[:9]})
    options = {"dataset": "three", "from_checkpoint": str(tmp_path / "first"), "epochs": 1}
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
    with pytest.raises(ArgumentError, match="is no run folder"):
        experiment_from(config(folder, None, **options))


def test_another_network_is_no_start(folder, tmp_path):
    train(config(folder, tmp_path / "first", epochs=1))
    start = {"from_checkpoint": str(tmp_path / "first")}
    with pytest.raises(ArgumentError, match="than --model text-transformer: the shape of blocks"):
        experiment_from(config(folder, None, model="text-transformer", **start))
    with pytest.raises(ArgumentError, match=r"shape of embedding.embedding is \(.+\) and \(258,"):
        experiment_from(config(folder, None, tokenizer="bytes", **start))
