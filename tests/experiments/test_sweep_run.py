"""Comparisons that are stopped, and go on."""

import json
import signal

import pytest

from experiments import compare, files, replicas, sweep_run
from tests.experiments import tiny_dataset
from tests.experiments.comparison import GRID, SMALL, run

pytestmark = pytest.mark.usefixtures("quick_compilation", "no_run_is_timed_alone")


class Interrupted:
    """As if Ctrl-C came during an epoch."""

    def __init__(self, epoch):
        self.left = epoch

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def signal(self):
        self.left -= 1
        return signal.SIGINT if self.left == 0 else None


def test_a_stopped_comparison_goes_on(tmp_path, capsys, monkeypatch):
    grid = ["--methods", "sgd", "sam", "--no-equal-gradients", *SMALL, "--epochs", 4]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(capsys, *grid, "--output", whole)
    # During the second method's second epoch.
    with monkeypatch.context() as patch:
        patch.setattr(compare, "Interruption", lambda: Interrupted(6))
        status, _, err = run(capsys, *grid, "--output", stopped)
    assert status == 130
    assert f"the same command goes on from here, with --output {stopped}" in err
    assert [row["method"] for row in files.read_csv(stopped / "runs.csv")] == ["sgd"] * 2

    # Lost during the fourth: what was saved before is not computed again.
    epochs = []
    epoch = replicas.Replicas.epoch

    def lost(self, population, inputs, number):
        epochs.append(number)
        if number == 3:
            raise MemoryError
        return epoch(self, population, inputs, number)

    monkeypatch.setattr(sweep_run, "SECONDS_BETWEEN_SAVES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(replicas.Replicas, "epoch", lost)
        with pytest.raises(MemoryError):
            run(capsys, *grid, "--output", stopped)
    assert epochs == [2, 3]
    epochs.clear()
    with monkeypatch.context() as patch:
        patch.setattr(replicas.Replicas, "epoch", counted_in(epochs))
        status, _, err = run(capsys, *grid, "--output", stopped)
    assert status == 0, err
    assert epochs == [3]
    assert not (stopped / "under-way").exists()
    assert (stopped / "curves.csv").read_text() == (whole / "curves.csv").read_text()
    rows, expected = files.read_csv(stopped / "runs.csv"), files.read_csv(whole / "runs.csv")
    for row in rows + expected:
        del row["milliseconds_per_step"]
    assert rows == expected


def counted_in(epochs):
    epoch = replicas.Replicas.epoch

    def counted(self, population, inputs, number):
        epochs.append(number)
        return epoch(self, population, inputs, number)

    return counted


@pytest.mark.parametrize(("stopped_in", "left"), [(5, [2]), (6, [])])
def test_parts_are_found_again(stopped_in, left, tmp_path, capsys, monkeypatch):
    """Also when fewer runs are left than a program is for, or nothing but their results."""
    grid = ["--methods", "sam", *SMALL, "--seeds", 3, "--epochs", 3, "--replicas-at-once", 2]
    grid += ["--output", tmp_path / "new"]
    with monkeypatch.context() as patch:
        patch.setattr(compare, "Interruption", lambda: Interrupted(stopped_in))
        status, _, _ = run(capsys, *grid)
    assert status == 130
    assert len(files.read_csv(tmp_path / "new" / "runs.csv")) == 2
    epochs = []
    monkeypatch.setattr(replicas.Replicas, "epoch", counted_in(epochs))
    status, _, err = run(capsys, *grid)
    assert status == 0, err
    assert epochs == left


def test_what_is_under_way_is_of_its_own_grid(tmp_path, capsys, monkeypatch):
    """Or half a run with some labels would be finished with others."""
    folder = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(compare, "Interruption", lambda: Interrupted(1))
        assert run(capsys, *GRID, "--output", folder)[0] == 130
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    status, _, err = run(capsys, *GRID, "--label-noise", 0.1, "--output", folder)
    assert status == 2
    assert f"--output {folder} has another comparison: its --label-noise is 0.3, not 0.1" in err
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before
    (folder / "comparison.json").write_text("{")
    status, _, err = run(capsys, *GRID, "--output", folder)
    assert status == 2
    assert f"--output {folder} has no comparison that can go on" in err
    (folder / "comparison.json").write_text("[]")
    status, _, err = run(capsys, "--from", folder, "--output", tmp_path / "report")
    assert status == 2
    assert f"{folder} cannot be read as results" in err


def test_a_folder_in_use_is_left_to_its_process(tmp_path, capsys):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "comparison.json").write_text("another's")
    with compare._locked(folder):
        status, _, err = run(capsys, *GRID, "--output", folder)
    assert status == 2
    assert f"--output {folder} is in use by another process" in err
    assert (folder / "comparison.json").read_text() == "another's"


def test_runs_of_streamed_images_are_trained_by_themselves(tmp_path, capsys):
    tiny_dataset.write(tmp_path, "varied", train=45, sizes=tiny_dataset.VARIED)
    args = ["--dataset", "varied", "--data-dir", tmp_path, "--image-size", 8, "--model", "mlp"]
    args += ["--epochs", 1, "--batch-size", 8, "--workers", 0, "--seeds", 1]
    args += ["--methods", "sparse-dynamic", "--rho", 0.05, 1e30]
    folder = tmp_path / "comparison"
    status, _, err = run(capsys, *args, "--output", folder)
    assert status == 0, err
    found = {row["rho"]: row for row in files.read_csv(folder / "runs.csv")}
    assert {rho: row["status"] for rho, row in found.items()} == {
        "0.05": "finished",
        "1e+30": "diverged",
    }
    summaries = [json.loads(path.read_text()) for path in folder.glob("runs/*/summary.json")]
    (finished,) = [summary for summary in summaries if summary["status"] == "finished"]
    assert float(found["0.05"]["test_accuracy"]) == finished["test_accuracy"]
    # What is there is not trained again.
    before = (folder / "runs.csv").read_text()
    run(capsys, *args, "--output", folder)
    assert (folder / "runs.csv").read_text() == before
