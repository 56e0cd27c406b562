"""Runs in two processes that are joined over the loopback interface."""

import signal
import time

import pytest

from experiments.config.config import Config
from experiments.run.folder import RunFolder
from experiments.run.training import train
from tests.experiments import tiny_dataset
from tests.experiments.run import runs
from tests.experiments.script import HEARTBEAT_TIMEOUT, start, start_together

pytestmark = [pytest.mark.processes]

# 416 steps, a save every 50: a run can be stopped in the middle.
LONG = ["--epochs", "4", "--batch-size", "12", "--checkpoint-every", "50", "--method", "friendly"]
# With a small step, rounding errors do not grow.
SLOWLY = ["--learning-rate", "0.0005"]
LONG += SLOWLY
slow = pytest.mark.slow


def ends(processes, status=0):
    """Waits for all; returns their outputs and errors."""
    results = [process.communicate(timeout=400) for process in processes]
    for process, (_, err) in zip(processes, results, strict=True):
        assert process.returncode == status, err
    return results


def rows_of(folder):
    return [{name: float(x) for name, x in row.items()} for row in runs.rows_of(folder)]


def assert_same_run(folder, other):
    rows, others = rows_of(folder), rows_of(other)
    assert len(rows) == len(others)
    for row, expected in zip(rows, others, strict=True):
        assert row == pytest.approx(expected, rel=2e-4)
    finished = [RunFolder(f).read_summary() for f in (folder, other)]
    assert [summary.status for summary in finished] == ["finished"] * 2
    assert finished[0].test_accuracy == pytest.approx(finished[1].test_accuracy, abs=0.01)


def names_in(folder):
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def when_saved(folder, processes, steps):
    deadline = time.monotonic() + 300
    checkpoints = folder / "checkpoints"
    while max(map(int, filter(str.isdigit, names_in(checkpoints))), default=0) < steps:
        for process in processes:
            assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The long run in one process, on one device."""
    folder = tmp_path_factory.mktemp("single") / "run"
    ends([start(*LONG, "--output", folder, cwd=folder.parent, quick=True)])
    return folder


@slow
def test_two_processes_of_two_devices_give_the_numbers_of_one(tmp_path):
    options = {"epochs": 2, "batch_size": 16, "train_examples": 80, "learning_rate": 0.0005}
    args = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    args += ["--output", tmp_path / "two"]
    two = start_together(*args, cwd=tmp_path, devices=2)
    train(Config(**options, devices=1, output=tmp_path / "single"))
    (first, _), (second, _) = ends(two)
    assert_same_run(tmp_path / "two", tmp_path / "single")
    # Only the first process speaks.
    assert "test accuracy" in first
    # Gloo's threads may mix up their lines, and are all that the other process prints.
    assert not any(word in second for word in ("accuracy", "loss", "compiled", "method="))
    summary = RunFolder(tmp_path / "two").read_summary()
    assert (summary.processes, summary.devices) == (2, 4)


@slow
def test_each_process_decodes_its_own_rows_of_a_stream(tmp_path):
    tiny_dataset.write(tmp_path, "varied", train=45, sizes=tiny_dataset.VARIED)
    options = {"dataset": "varied", "data_dir": tmp_path, "image_size": 8, "model": "mlp"}
    options |= {"epochs": 2, "batch_size": 8, "workers": 0, "learning_rate": 0.0005}
    args = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    two = start_together(*args, "--output", tmp_path / "two", cwd=tmp_path)
    train(Config(**options, devices=1, output=tmp_path / "single"))
    ends(two)
    assert_same_run(tmp_path / "two", tmp_path / "single")


@slow
def test_a_termination_of_one_process_saves_in_all(single, tmp_path):
    folder = tmp_path / "run"
    processes = start_together(*LONG, "--output", folder, cwd=tmp_path)
    when_saved(folder, processes, 100)
    processes[1].send_signal(signal.SIGTERM)
    (out, _), _ = ends(processes)
    assert "interrupted and saved after step" in out
    # It resumes with another number of processes and of devices.
    ends(
        [
            start(
                "--resume", folder, "--devices", 2, "--fsdp", 2, cwd=tmp_path, devices=2, quick=True
            )
        ]
    )
    assert_same_run(folder, single)


@slow
def test_when_one_process_is_killed_the_other_ends_with_a_message(tmp_path):
    """`python -m tests.attacks` also kills the first one, many times."""
    victim = 1
    folder = tmp_path / "run"
    processes = start_together(*LONG, "--output", folder, cwd=tmp_path)
    when_saved(folder, processes, 100)
    processes[victim].kill()
    begun = time.monotonic()
    _, err = processes[1 - victim].communicate(timeout=10 * HEARTBEAT_TIMEOUT)
    assert time.monotonic() - begun < 4 * HEARTBEAT_TIMEOUT
    assert processes[1 - victim].returncode != 0
    assert f"--resume {folder}" in err.splitlines()[-1]
    processes[victim].communicate()


@pytest.mark.slow
def test_processes_with_different_options_end(tmp_path):
    processes = start_together("--epochs", 1, cwd=tmp_path, own=[["--seed", 0], ["--seed", 1]])
    for _, err in ends(processes, status=2):
        assert "must have the same options: process 1" in err
    assert not names_in(tmp_path)


@slow
def test_processes_with_different_data_end(tmp_path):
    for folder, encoding in {"data": "png", "other": "jpeg"}.items():
        tiny_dataset.write(tmp_path / folder, encoding=encoding)
    options = ["--dataset", "tiny", "--model", "mlp", "--batch-size", 8]
    own = [["--data-dir", tmp_path / folder] for folder in ("data", "other")]
    for _, err in ends(start_together(*options, cwd=tmp_path, own=own), status=2):
        assert "the same data: process 1" in err
