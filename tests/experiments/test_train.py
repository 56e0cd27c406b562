"""The training script, as its users run it."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import data, models, train, training
from experiments.config import ArgumentError, Config

ROOT = Path(__file__).parents[2]
SHORT = ["--epochs", "2"]


def run(capsys, *args):
    """Exit status, standard output, standard error of the script in this process."""
    status = 0
    try:
        train.main([str(arg) for arg in args])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def start(*args, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *map(str, args)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_arguments(tmp_path):
    process = start(cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    match = re.search(r"test accuracy (\d+\.\d+) % on 360 examples", out.splitlines()[-1])
    assert match
    assert float(match[1]) >= 97.0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-bisam-log-")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "metrics.csv",
        "curves.png",
        "checkpoint",
        "summary.json",
    }
    assert len(re.findall(r"^epoch +\d+  loss .* validation .* examples/s", out, re.M)) == 50
    assert "epoch/s" in err


def test_mean_accuracy_over_five_seeds(tmp_path):
    accuracies = [
        train.train(Config(seed=seed, output=tmp_path / str(seed)))["test_accuracy"]
        for seed in range(5)
    ]
    assert np.mean(accuracies) >= 0.98


def test_second_gradient_beats_label_noise(tmp_path):
    accuracy = {
        method: np.mean(
            [
                train.train(
                    Config(
                        method=method,
                        rho=1.0,
                        label_noise=0.4,
                        seed=seed,
                        output=tmp_path / f"{method}-{seed}",
                    )
                )["test_accuracy"]
                for seed in range(3)
            ]
        )
        for method in ("sgd", "sam", "bisam-log")
    }
    assert accuracy["sam"] > accuracy["sgd"] + 0.05
    assert accuracy["bisam-log"] > accuracy["sgd"] + 0.05


@pytest.mark.parametrize(
    "args",
    [
        ["--method", "sgd", "--base", "adamw"],
        ["--method", "sam", "--rho", "0.1", "--momentum", "0.8"],
        ["--method", "asam", "--eta", "0.1", "--batch-size", "64"],
        ["--method", "bisam-tanh", "--mu", "5", "--alpha", "0.2", "--label-smoothing", "0"],
        [
            "--model",
            "cnn",
            "--label-noise",
            "0.2",
            "--weight-decay",
            "0",
            "--learning-rate",
            "0.05",
        ],
    ],
    ids=" ".join,
)
def test_options_and_run_folder(args, tmp_path, capsys):
    folder = tmp_path / "run"
    status, out, _ = run(capsys, *args, *SHORT, "--seed", "4", "--output", folder)
    assert status == 0
    config = json.loads((folder / "config.json").read_text())
    for name, value in zip(args[::2], args[1::2], strict=True):
        assert str(config[name[2:].replace("-", "_")]) in (value, value + ".0")
    assert config["seed"] == 4
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert f"test accuracy {100 * summary['test_accuracy']:.2f} %" in out.splitlines()[-1]


def test_checkpoint_holds_what_the_summary_reports(tmp_path, capsys):
    folder = tmp_path / "run"
    run(capsys, "--epochs", "4", "--output", folder)
    summary = json.loads((folder / "summary.json").read_text())
    apply, params, stats = models.create("mlp", (8, 8, 1), 10, seed=99)
    with ocp.CheckpointManager(folder / "checkpoint") as manager:
        assert manager.latest_step() == summary["checkpoint_epoch"]
        like = {"params": params, "stats": stats}
        saved = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
    accuracy = training.make_accuracy(apply)
    test, validation = (data.on_device(split) for split in data.digits()[2:0:-1])
    assert accuracy(saved["params"], saved["stats"], test) == summary["test_accuracy"]
    assert accuracy(saved["params"], saved["stats"], validation) == summary["validation_accuracy"]
    with (folder / "metrics.csv").open() as file:
        accuracies = [float(row["validation_accuracy"]) for row in csv.DictReader(file)]
    assert max(accuracies) == pytest.approx(summary["validation_accuracy"])


def test_same_seed_same_run(tmp_path, capsys):
    columns = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(capsys, *SHORT, "--seed", seed, "--output", tmp_path / name)
        with (tmp_path / name / "metrics.csv").open() as file:
            columns.append([row["loss"] for row in csv.DictReader(file)])
    assert columns[0] == columns[1] != columns[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "adam"], "invalid choice 'adam' for argument '--method'. Expected one of"),
        (["--epochs", "0"], "--epochs must be finite, at least 1, got 0"),
        (["--epochs", "many"], "Error parsing --epochs: invalid literal"),
        (["--nonsense"], "Unrecognized options: --nonsense"),
        (["--rho", "-0.1"], "--rho must be finite, at least 0, got -0.1"),
        (["--rho", "1e39"], "--rho must be finite, at least 0, got 1e+39"),
        (["--rho", "nan"], "--rho must be finite, at least 0, got nan"),
        (["--mu", "0"], "--mu must be finite, greater than 0, got 0.0"),
        (["--sparsity", "1.5"], "--sparsity must be finite, at least 0 and at most 1, got 1.5"),
        (["--num-samples", "0"], "--num-samples must be finite, at least 1"),
        (["--gamma", "0"], "--gamma must be finite, greater than 0 and at most 1"),
        (["--method", "efficient", "--gamma", "0.01"], "--gamma leaves less than 2 examples"),
        (["--perturbation", "tanh"], "--perturbation tanh contradicts --method bisam-log"),
        (["--perturbation", "hinge"], "invalid choice 'hinge'"),
        (["--alpha", "-1"], "--alpha must be finite, greater than 0"),
        (["--eta", "-1"], "--eta must be finite, at least 0"),
        (
            ["--label-noise", "1.5"],
            "--label-noise must be finite, at least 0 and at most 1, got 1.5",
        ),
        (["--batch-size", "1258"], "--batch-size must be at most the 1257 training examples"),
        (["--batch-size", "1"], "--batch-size must be finite, at least 2"),
        (["--learning-rate", "inf"], "--learning-rate must be finite"),
        (["--weight-decay", "-1"], "--weight-decay must be finite"),
        (["--momentum", "-1"], "--momentum must be finite"),
        (["--label-smoothing", "2"], "--label-smoothing must be finite"),
        (["--seed", "-1"], "--seed must be finite, at least 0"),
    ],
)
def test_bad_input_is_one_line(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_help(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for option in ("--method", "--rho", "--label-noise", "--output"):
        assert option in out


def test_an_existing_folder_is_never_overwritten(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    status, _, err = run(capsys, *SHORT, "--output", folder)
    assert status == 2
    assert "--output must be a new folder" in err
    assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    status, _, err = run(capsys, *SHORT, "--output", folder / "notes.txt" / "run")
    assert status == 2
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "args", [["--learning-rate", "1e38"], ["--learning-rate", "1e38", "--batch-size", "1257"]]
)
def test_a_non_finite_loss_stops_the_run_and_names_the_step(args, tmp_path, capsys):
    folder = tmp_path / "run"
    status, _, err = run(capsys, *SHORT, *args, "--output", folder)
    assert status == 1
    assert re.search(r"error: stopped: the loss is not finite at step \d+ \(epoch 1\)", err)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"].startswith("stopped: the loss is")
    assert summary["epochs_completed"] == 0


def test_interruption_leaves_a_readable_run(tmp_path):
    folder = tmp_path / "run"
    process = start("--epochs", 100_000, "--output", folder, cwd=tmp_path)
    metrics = folder / "metrics.csv"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["epochs_completed"] == metrics.read_text().count("\n") - 1
    assert 0.5 < summary["test_accuracy"] <= 1
    assert (folder / "curves.png").exists()


def test_resolved_configuration():
    resolved = Config(method="bisam-tanh", mu=3.0, output=Path("x")).resolved()
    assert (resolved.rho, resolved.mu, resolved.alpha, resolved.eta) == (0.05, 3.0, 0.1, None)
    plain = Config(method="sgd", rho=0.1, base="adamw", output=Path("x")).resolved()
    assert (plain.rho, plain.momentum, plain.learning_rate) == (None, None, 2e-3)
    with pytest.raises(ArgumentError, match="--epochs"):
        Config(epochs=0)
