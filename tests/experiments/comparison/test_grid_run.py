"""Comparisons that are stopped and resumed."""

import json
import signal

import numpy as np
import pytest

from experiments.comparison import comparing, grid_run
from experiments.comparison.replicas import Replicas
from experiments.config.config import Config
from experiments.config.recipe import resolve
from experiments.run.checkpoints import Checkpoints
from experiments.system import files
from tests.experiments import tiny_dataset
from tests.experiments.comparison.command import SMALL, quickly, run
from tests.experiments.rows import read_csv

# Two runs at once: two parts of one program.
GRID = ["--methods", "sam", "--rho", 0.05, 0.5, *SMALL, "--epochs", 4, "--replicas-at-once", 2]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quickly():
        yield


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


def run_interrupted(monkeypatch, epoch, capsys, *args):
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "Interruption", lambda: Interrupted(epoch))
        return run(capsys, *args)


@pytest.fixture
def epochs(monkeypatch):
    """Numbers of the epochs that were begun, and the number of one that fails."""
    computed, lost, epoch = [], {}, Replicas.epoch

    def counted(self, population, inputs, number):
        computed.append(number)
        if number == lost.get("epoch"):
            raise MemoryError
        return epoch(self, population, inputs, number)

    monkeypatch.setattr(Replicas, "epoch", counted)
    return computed, lost


def saved_at_once(checkpoints, *args, save=Checkpoints.save):
    """Saves before anything is lost: threads of a process that is gone would not disturb us."""
    save(checkpoints, *args)
    checkpoints.wait()


def results_in(folder):
    rows = read_csv(folder / "runs.csv")
    for row in rows:
        del row["milliseconds_per_step"]
    return rows, (folder / "curves.csv").read_text()


def test_a_stopped_comparison_is_resumed(tmp_path, capsys, monkeypatch, epochs):
    computed, lost = epochs
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    # What the first part saves is of no use to the second.
    with monkeypatch.context() as patch:
        patch.setattr(grid_run, "SECONDS_BETWEEN_SAVES", 0)
        assert run(capsys, *GRID, "--output", whole)[0] == 0
    # During the second part's second epoch.
    status, _, err = run_interrupted(monkeypatch, 6, capsys, *GRID, "--output", stopped)
    assert status == 130
    assert f"the same command with --output {stopped}" in err
    assert [row["rho"] for row in read_csv(stopped / "runs.csv")] == ["0.05"] * 2

    # Lost during the fourth: what was saved before is not computed again.
    computed.clear()
    lost["epoch"] = 3
    with monkeypatch.context() as patch:
        patch.setattr(grid_run, "SECONDS_BETWEEN_SAVES", 0)
        patch.setattr(Checkpoints, "save", saved_at_once)
        with pytest.raises(MemoryError):
            run(capsys, *GRID, "--output", stopped)
    assert computed == [2, 3]
    computed.clear()
    lost.clear()
    status, _, err = run(capsys, *GRID, "--output", stopped)
    assert status == 0, err
    assert computed == [3]
    assert not (stopped / "under-way").exists()
    assert results_in(stopped) == results_in(whole)


@pytest.mark.parametrize(("stopped_in", "left"), [(6, [2, 3]), (8, [])])
def test_parts_are_found_again(stopped_in, left, tmp_path, capsys, monkeypatch, epochs):
    """Also when fewer runs are left than a program is for, or nothing but their results."""
    grid = [arg for arg in GRID if arg != 0.5] + ["--seeds", 3, "--output", tmp_path / "new"]
    assert run_interrupted(monkeypatch, stopped_in, capsys, *grid)[0] == 130
    assert len(read_csv(tmp_path / "new" / "runs.csv")) == 2
    computed, _ = epochs
    computed.clear()
    status, _, err = run(capsys, *grid)
    assert status == 0, err
    assert computed == left
    # The program's other place, which is filled up, is no run.
    assert [row["seed"] for row in read_csv(tmp_path / "new" / "runs.csv")] == [*"012"]


@pytest.mark.slow
def test_results_do_not_depend_on_what_else_is_trained(tmp_path, capsys):
    """Nor is any of them given to another run."""
    found = {}
    for name, seeds in (("first", [0, 3]), ("second", [1, 2])):
        seeds = ["--first-seed", seeds[0], "--seeds", seeds[1]]
        status, _, err = run(capsys, *GRID, *seeds, "--output", tmp_path / name)
        assert status == 0, err
        rows, _ = results_in(tmp_path / name)
        found[name] = {(row["rho"], row["seed"]): row for row in rows}
    assert len({row["validation_accuracy"] for row in found["first"].values()}) > 3
    assert len(found["first"]) == 6
    assert set(found["second"]) == {(rho, seed) for rho in ("0.05", "0.5") for seed in "12"}
    for key, row in found["second"].items():
        assert {**row, "run": ""} == {**found["first"][key], "run": ""}


def test_what_is_under_way_belongs_to_its_own_grid(tmp_path, capsys, monkeypatch):
    """Or half a run with some labels would be finished with others."""
    folder = tmp_path / "new"
    assert run_interrupted(monkeypatch, 1, capsys, *GRID, "--output", folder)[0] == 130
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    status, _, err = run(capsys, *GRID, "--label-noise", 0.1, "--output", folder)
    assert status == 2
    assert f"--output {folder} has another comparison: its --label-noise is 0.3, not 0.1" in err
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before
    (folder / "comparison.json").write_text("{")
    status, _, err = run(capsys, *GRID, "--output", folder)
    assert status == 2
    assert "comparison.json was changed after it was written" in err


def test_a_folder_in_use_is_left_to_its_process(tmp_path, capsys):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "comparison.json").write_text("another's")
    with files.locked(folder):
        status, _, err = run(capsys, *GRID, "--output", folder)
    assert status == 2
    assert f"--output {folder} is in use by another process" in err
    assert (folder / "comparison.json").read_text() == "another's"


def test_among_equal_epochs_the_last_is_tested():
    recipe = resolve(Config(seed=3))
    curve = np.asarray([[1.0, 0.5, 1.0], [0.9, 0.7, 1.0], [0.8, 0.7, 1.1], [0.7, 0.6, 1.2]])
    result = grid_run._result(recipe, 4, curve, (0.6, 0.5), 1.0, 1)
    assert (result.checkpoint_epoch, result.validation_accuracy) == (3, 0.7)
    assert (result.test_accuracy, result.last_test_accuracy) == (0.6, 0.5)
    assert result.key == recipe.key


@pytest.mark.parametrize("column", range(3))
def test_a_run_with_a_number_that_is_not_finite_diverged(column):
    curve = np.full((4, 3), 0.5)
    curve[2, column] = np.nan
    result = grid_run._result(resolve(Config()), 4, curve, (0.6, 0.5), 1.0, 1)
    assert (result.status, result.test_accuracy) == ("diverged", None)


@pytest.mark.slow
def test_runs_of_streamed_images_are_trained_by_themselves(tmp_path, capsys):
    tiny_dataset.write(tmp_path, "varied", train=45, sizes=tiny_dataset.VARIED)
    args = ["--dataset", "varied", "--data-dir", tmp_path, "--image-size", 8, "--model", "mlp"]
    args += ["--epochs", 1, "--batch-size", 8, "--workers", 0, "--seeds", 1]
    args += ["--methods", "sam", "--rho", 0.05, 1e30]
    folder = tmp_path / "comparison"
    status, _, err = run(capsys, *args, "--output", folder)
    assert status == 0, err
    found = {row["rho"]: row for row in read_csv(folder / "runs.csv")}
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


@pytest.mark.slow
def test_chosen_values_are_confirmed_with_fresh_seeds(tmp_path, capsys, monkeypatch, epochs):
    args = [*GRID[:-2], "--confirm", 3, "--methods", "sgd", "sam", "sam@every=2"]
    args += ["--no-equal-gradients"]
    monkeypatch.setattr(Checkpoints, "save", saved_at_once)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    status, out, err = run(capsys, *args, "--output", whole)
    assert status == 0, err
    assert "10 runs of sgd, sam, sam@every=2; 2 seeds" in out
    assert "then 9 runs of the chosen values; 3 fresh seeds" in out
    rows = read_csv(whole / "runs.csv")
    seeds = {flag: {row["seed"] for row in rows if row["confirms"] == flag} for flag in ("0", "1")}
    assert seeds == {"0": {"0", "1"}, "1": {"2", "3", "4"}}
    for method in ("sam", "sam@every=2"):
        means = {
            rho: np.mean([float(r["validation_accuracy"]) for r in rows if of(r, method, rho, "0")])
            for rho in ("0.05", "0.5")
        }
        best = max(means, key=lambda rho: (means[rho], -float(rho)))
        confirmed = [r for r in rows if r["method"] == method and r["confirms"] == "1"]
        assert [row["rho"] for row in confirmed] == [best] * 3
        (line,) = [x for x in read_csv(whole / "summary.csv") if x["method"] == method]
        tested = [float(row["test_accuracy"]) for row in confirmed]
        assert float(line["test_accuracy"]) == pytest.approx(np.mean(tested))
        assert line["seeds"] == "3"
    text = (whole / "report.md").read_text()
    assert (
        "The values were chosen with the seeds 0 to 1. Everything above is about the fresh" in text
    )

    # Stopped among the runs that confirm, and resumed.
    status, _, _ = run_interrupted(monkeypatch, 18, capsys, *args, "--output", stopped)
    assert status == 130
    computed, _ = epochs
    computed.clear()
    begun = read_csv(stopped / "runs.csv")
    assert len(begun) < len(rows)
    assert any(row["confirms"] == "1" for row in begun)
    status, _, err = run(capsys, *args, "--output", stopped)
    assert status == 0, err
    assert results_in(stopped) == results_in(whole)
    # Two of four epochs of the second method's runs were saved, and none of the third's.
    assert computed == [2, 3, 0, 1, 2, 3]


def of(row, method, rho, confirms):
    return (row["method"], row["rho"], row["confirms"]) == (method, rho, confirms)
