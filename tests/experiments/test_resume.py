"""Runs that were stopped go on as if they never had."""

import csv
import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import evaluate, runs, train
from experiments.checkpoints import UNKNOWN, Checkpoints
from experiments.experiment import Experiment
from tests.experiments.script import start

pytestmark = pytest.mark.processes

# 1,256 steps, a save every 40: a run is in the middle of an epoch, and of a save, most of the time.
LONG = ["--epochs", "4", "--batch-size", "4", "--learning-rate", "0.01", "--checkpoint-every", "40"]
STEPS = 4 * 314


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
        time.sleep(0.005)  # a save takes longer
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return out


def final(folder):
    """What a finished run left: all of its state, metrics, test accuracy."""
    config = dataclasses.replace(train.load_config(folder), devices=1)
    checkpoints = Checkpoints(folder / "checkpoints", keep=None)
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


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the run that says it did not come to its end."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    summary = folder / "summary.json"
    summary.write_text(summary.read_text().replace('"finished"', '"started"'))
    return folder


def size_of(path):
    return path.stat().st_size


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    status, out, _ = resume(capsys, finished)
    assert status == 0
    assert "compiled" not in out
    assert "test accuracy" in out.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


def test_a_run_in_use_is_left_to_its_process(unfinished, capsys):
    folder = runs.RunFolder(unfinished)
    folder.lock()
    status, _, err = resume(capsys, unfinished)
    folder.close()
    assert status == 2
    assert "is in use by another process" in err
    assert err.count("\n") == 1


def test_evaluation_leaves_a_save_under_way_alone(unfinished, capsys):
    under_way = unfinished / "checkpoints" / "99.orbax-checkpoint-tmp"
    under_way.mkdir()
    evaluate.main([str(unfinished)])
    out, err = capsys.readouterr()
    assert "accuracy" in out
    assert err == ""
    assert under_way.exists()


def test_without_a_damaged_best_checkpoint_the_best_is_another(unfinished, capsys):
    checkpoints = Checkpoints(unfinished / "checkpoints", keep=None)
    best = checkpoints.best_step()
    others = set(checkpoints.steps()) - {best}
    checkpoints.close()
    truncate(max((unfinished / "checkpoints" / str(best)).glob("state/**/d/*"), key=size_of))
    status, _, err = resume(capsys, unfinished)
    assert status == 2
    assert f"{best} is damaged" in err
    shutil.rmtree(unfinished / "checkpoints" / str(best))
    status, out, err = resume(capsys, unfinished)
    assert status == 0, err
    assert others
    assert "test accuracy" in out.splitlines()[-1]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, change_a_byte, Path.unlink])
@pytest.mark.parametrize("which", ["arrays", "metadata", "progress"])
def test_a_damaged_checkpoint_is_one_clear_error(damage, which, unfinished, capsys):
    folder = unfinished
    checkpoint = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    files = {
        "arrays": max(checkpoint.glob("state/**/d/*"), key=size_of),
        "metadata": checkpoint / "state" / "_METADATA",
        "progress": checkpoint / "progress" / "metadata",
    }
    damage(files[which])
    status, _, err = resume(capsys, folder)
    assert status == 2
    assert f"the checkpoint {checkpoint.resolve()} is damaged or of another run" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"model": "mlp"', '"model": "cnn"', "is damaged or of another run"),
        ('"seed": 0', '"seed": 1', "is of another run: its seed is 0, not 1"),
        ('"rho": 0.05', '"rho": 0.06', "is of another run: its rho is 0.05, not 0.06"),
    ],
)
def test_a_checkpoint_of_another_run_is_one_clear_error(old, new, message, unfinished, capsys):
    config = unfinished / "config.json"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    status, _, err = resume(capsys, unfinished)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run folder: it has no config.json"),
        ("{", "is damaged"),
        ("[]", "it holds no configuration"),
        ('{"epochs": 3}', "its config.json is of another version: alpha, base, batch_size"),
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
    assert err.startswith("error: --resume takes the run's own configuration: remove all other")


def test_the_best_checkpoint_and_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    state = {"w": np.zeros(3, np.float32)}
    for step, accuracy in enumerate([0.1, 0.9, 0.9, UNKNOWN, 0.3, 0.2]):
        checkpoints.save(step, state, {}, accuracy)
        checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    checkpoints.close()
