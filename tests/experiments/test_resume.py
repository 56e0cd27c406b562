"""Runs that were stopped go on as if they never had."""

import csv
import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import runs, train
from experiments.checkpoints import UNKNOWN, Checkpoints
from experiments.experiment import Experiment
from tests.experiments.script import start

# 1,884 steps, a save every 40: a run is in the middle of an epoch, and of a save, most of the time.
LONG = ["--epochs", "6", "--batch-size", "4", "--learning-rate", "0.01", "--checkpoint-every", "40"]
STEPS = 6 * 314


def saved_steps(folder):
    names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def is_saving(folder):
    return any("tmp" in name for name in os.listdir(folder / "checkpoints"))


def stop(process, folder, number, when):
    """Sends the signal as soon as `when` is true; the run must not have ended by itself."""
    deadline = time.monotonic() + 300
    while not when():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return out


def final(folder):
    """What a finished run left: all of its state, metrics, test accuracy."""
    config = train.load_config(folder)
    checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
    assert checkpoints.steps()[-1] == STEPS
    state, _ = checkpoints.restore(STEPS, Experiment(config).state)
    checkpoints.close()
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["examples_per_second"]
    summary = runs.RunFolder(folder).read_summary()
    assert summary["status"] == "finished"
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)], rows, summary["test_accuracy"]


@pytest.mark.parametrize("method", ["sgd", "bisam-log", "sparse-dynamic"])
def test_a_stopped_run_ends_as_one_that_never_stopped(method, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    uninterrupted = start("--method", method, *LONG, "--output", whole, cwd=tmp_path)

    # Terminated: saves and says so.
    process = start("--method", method, *LONG, "--output", stopped, cwd=tmp_path)
    out = stop(process, stopped, signal.SIGTERM, lambda: len(saved_steps(stopped)) >= 2)
    assert process.returncode == 0
    last = saved_steps(stopped)[-1]
    assert f"saved at step {last}" in out
    assert 0 < last < STEPS

    # Killed in the middle of an epoch.
    process = start("--resume", stopped, cwd=tmp_path)
    stop(process, stopped, signal.SIGKILL, lambda: saved_steps(stopped)[-1] > last)
    assert process.returncode == -signal.SIGKILL
    last = saved_steps(stopped)[-1]
    assert last < STEPS

    # Killed in the middle of a save.
    for _ in range(5):
        process = start("--resume", stopped, cwd=tmp_path)
        stop(
            process,
            stopped,
            signal.SIGKILL,
            lambda: saved_steps(stopped)[-1] > last and is_saving(stopped),
        )
        if is_saving(stopped):
            break
    assert is_saving(stopped)
    assert saved_steps(stopped)[-1] < STEPS

    process = start("--resume", stopped, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "going on from step" in out
    _, err = uninterrupted.communicate(timeout=300)
    assert uninterrupted.returncode == 0, err
    leaves, rows, test_accuracy = final(stopped)
    expected_leaves, expected_rows, expected_accuracy = final(whole)
    for leaf, expected in zip(leaves, expected_leaves, strict=True):
        np.testing.assert_array_equal(leaf, expected)
    assert rows == expected_rows
    assert test_accuracy == expected_accuracy


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = start("--epochs", 2, "--output", folder, cwd=folder.parent)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder


def resume(capsys, folder, *args):
    status = 0
    try:
        train.main(["--resume", str(folder), *args])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def copy_of(finished, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", finished, folder], check=True)
    return folder


def test_a_finished_run_is_not_trained_again(finished, capsys):
    before = (finished / "metrics.csv").read_text()
    status, out, _ = resume(capsys, finished)
    assert status == 0
    assert "compiled" not in out
    assert "test accuracy" in out.splitlines()[-1]
    assert (finished / "metrics.csv").read_text() == before


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, change_a_byte, Path.unlink])
@pytest.mark.parametrize("which", ["arrays", "metadata", "progress"])
def test_a_damaged_checkpoint_is_one_clear_error(damage, which, finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    checkpoint = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    files = {
        "arrays": max(checkpoint.glob("state/**/d/*"), key=lambda path: path.stat().st_size),
        "metadata": checkpoint / "state" / "_METADATA",
        "progress": checkpoint / "progress" / "metadata",
    }
    damage(files[which])
    status, _, err = resume(capsys, folder)
    assert status == 2
    assert f"the checkpoint {checkpoint.resolve()} is damaged or of another run" in err
    assert err.count("\n") == 1


def test_a_checkpoint_of_another_model_is_one_clear_error(finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model": "mlp"', '"model": "cnn"'))
    status, _, err = resume(capsys, folder)
    assert status == 2
    assert "is damaged or of another run" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run folder: it has no config.json"),
        ("{", "is damaged"),
        ("[]", "it holds no configuration"),
        ('{"epochs": 3}', "cannot be read as a run"),
    ],
)
def test_what_is_no_run_is_one_clear_error(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    status, out, err = resume(capsys, tmp_path)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_resume_takes_no_other_options(finished, capsys):
    status, _, err = resume(capsys, finished, "--epochs", "9")
    assert status == 2
    assert err == "error: --resume takes the run's own configuration: remove --epochs\n"


def test_the_best_checkpoint_and_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    state = {"w": np.zeros(3, np.float32)}
    for step, accuracy in enumerate([0.1, 0.9, 0.9, UNKNOWN, 0.3, 0.2]):
        checkpoints.save(step, state, {}, accuracy)
        checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    checkpoints.close()
