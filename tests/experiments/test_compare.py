"""The comparison, as its users run it."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import files, replicas, sweep_run, train
from experiments.config import Config
from experiments.run import NonFiniteLossError
from tests.experiments.comparison import GRID, SMALL, run

pytestmark = pytest.mark.usefixtures("quick_compilation", "no_run_is_timed_alone")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison, and what was printed."""
    folder = tmp_path_factory.mktemp("finished") / "comparison"
    command = [sys.executable, "-m", "experiments.compare", *map(str, GRID), "--output", folder]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=quick)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def test_the_grid(finished):
    rows = files.read_csv(finished[0] / "runs.csv")
    runs = [(row["method"], row["epochs"], row["rho"], row["seed"]) for row in rows]
    expected = [("sgd", epochs, "", seed) for epochs in ("2", "4") for seed in "01"]
    expected += [("sam", "2", rho, seed) for rho in ("0.05", "0.5") for seed in "01"]
    assert sorted(runs) == sorted(expected)
    assert {(row["method"], row["gradients"]) for row in rows} == {("sgd", "1"), ("sam", "2")}
    curves = files.read_csv(finished[0] / "curves.csv")
    assert len(curves) == sum(int(row["epochs"]) for row in rows)
    for row in rows:
        course = [float(c["validation_accuracy"]) for c in curves if c["run"] == row["run"]]
        assert float(row["validation_accuracy"]) == max(course)
        assert int(row["checkpoint_epoch"]) == max(
            epoch for epoch, value in enumerate(course, 1) if value == max(course)
        )


def test_among_equal_epochs_the_last_is_tested():
    run = Config(seed=3).resolved()
    curve = np.asarray([[1.0, 0.5, 1.0], [0.9, 0.7, 1.0], [0.8, 0.7, 1.1], [0.7, 0.6, 1.2]])
    result = sweep_run._result(run, 4, curve, 0.6, 1.0, 1)
    assert (result.checkpoint_epoch, result.validation_accuracy) == (3, 0.7)


def test_what_is_printed(finished):
    folder, out = finished
    assert re.search(r"^sam, 2 epochs: 4 runs, 4 at once, compiled in \d+\.\d s$", out, re.M)
    assert re.search(r"^8 runs took \d+ s.*times as long.*$", out, re.M)
    assert out.splitlines()[-1] == f"wrote {folder}/report.md and {folder}/report.html"


def test_the_report(finished):
    folder, _ = finished
    text = (folder / "report.md").read_text()
    assert "## digits, 96 examples, mlp, batch 32, 30 % wrong labels" in text
    summary = files.read_csv(folder / "summary.csv")
    assert [row["method"] for row in summary] == re.findall(r"^\| (\S+) \|", text, re.M)[2:]
    accuracies = [float(row["test_accuracy"]) for row in summary]
    assert accuracies == sorted(accuracies, reverse=True)
    runs = files.read_csv(folder / "runs.csv")
    for row in summary:
        mine = [r for r in runs if (r["method"], r["epochs"]) == (row["method"], row["epochs"])]
        rho = row["chosen"].removeprefix("rho ")
        by_rho = {}
        for r in mine:
            by_rho.setdefault(r["rho"], []).append(r)
        validation = {
            key: sum(float(r["validation_accuracy"]) for r in rs) / 2 for key, rs in by_rho.items()
        }
        assert validation[rho] == max(validation.values())
        mean = sum(float(r["test_accuracy"]) for r in by_rho[rho]) / 2
        assert float(row["test_accuracy"]) == pytest.approx(mean)
        # Equal gradients: of plain training with as many epochs as gradients a step.
        if row["method"] != "sgd":
            gradients, seeds = int(mine[0]["gradients"]), "01"
            plain = {
                r["seed"]: float(r["test_accuracy"])
                for r in runs
                if (r["method"], int(r["epochs"])) == ("sgd", 2 * gradients)
            }
            ours = {r["seed"]: float(r["test_accuracy"]) for r in by_rho[rho]}
            expected = sum(ours[seed] - plain[seed] for seed in seeds) / 2
            assert float(row["same_gradients_difference"]) == pytest.approx(expected)
    about = json.loads((folder / "comparison.json").read_text())
    assert about["command"] in text
    assert about["versions"]["jax"] in text
    assert "no p-value can be below" in text


def test_the_page_needs_no_other_file(finished):
    folder, _ = finished
    page = (folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    images = sorted(path.read_text() for path in folder.glob("*.svg"))
    assert len(images) == 2
    encoded = "data:image/svg+xml;base64,"
    assert sorted(base64.b64decode(s.removeprefix(encoded)).decode() for s in sources) == images
    assert page.count("<table>") == 1
    assert page.count("<tr>") == 1 + len(files.read_csv(folder / "summary.csv"))


def test_the_same_numbers_with_fewer_at_once(finished, tmp_path, capsys):
    folder, _ = finished
    output = tmp_path / "one"
    status, out, err = run(capsys, *GRID, "--replicas-at-once", 1, "--output", output)
    assert status == 0, err
    assert "4 runs, 1 at once" in out
    for row, expected in zip(
        files.read_csv(output / "runs.csv"), files.read_csv(folder / "runs.csv"), strict=True
    ):
        for name in ("method", "rho", "seed", "checkpoint_epoch"):
            assert row[name] == expected[name]
        # Rounding errors turn single predictions, of 180 and 360.
        for name, few in (("validation_accuracy", 3 / 180), ("test_accuracy", 3 / 360)):
            assert float(row[name]) == pytest.approx(float(expected[name]), abs=few)


def test_what_goes_on_elsewhere_is_told(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    lines = (folder / "runs.csv").read_text().splitlines(keepends=True)
    (folder / "runs.csv").write_text("".join(lines[:-2]))
    about = json.loads((folder / "comparison.json").read_text())
    about["versions"]["jax"] = "0.0.1"
    (folder / "comparison.json").write_text(json.dumps(about))
    status, _, err = run(capsys, *GRID, "--output", folder)
    assert status == 0, err
    text = (folder / "report.md").read_text()
    assert "jax 0.0.1" in text
    assert f"Continued with: bisam_jax {about['versions']['bisam_jax']}, jax {jax.__version__}" in (
        text
    )


def test_a_finished_comparison_is_not_computed_again(finished, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    before = {name: (folder / name).read_text() for name in ("runs.csv", "report.md")}
    # The largest file, which not everybody keeps.
    (folder / "curves.csv").unlink()
    monkeypatch.setattr(replicas.Replicas, "epoch", None)
    status, _, err = run(capsys, *GRID, "--output", folder)
    assert status == 0, err
    for name, text in before.items():
        assert (folder / name).read_text() == text
    assert "took" in before["report.md"]
    assert "1-curves.svg" in before["report.md"]


def test_another_grid_is_refused(finished, capsys):
    folder, _ = finished
    before = (folder / "runs.csv").read_text()
    args = [arg if arg != 0.5 else 0.4 for arg in GRID]
    status, _, err = run(capsys, *args, "--output", folder)
    assert status == 2
    assert err.splitlines()[-1].startswith(f"error: --output {folder} has another comparison")
    assert "--rho" in err
    assert (folder / "runs.csv").read_text() == before


def test_results_are_merged(finished, tmp_path, capsys):
    folder, _ = finished
    other, single = tmp_path / "other", tmp_path / "single"
    run(capsys, "--methods", "asam", "--rho", 1.0, *SMALL, "--output", other)
    task = {"epochs": 2, "train_examples": 96, "label_noise": 0.3, "devices": 1}
    train.train(Config(**task, method="bisam-log", seed=1, output=single))
    clean = tmp_path / "clean"
    train.train(Config(**task | {"label_noise": 0.0}, method="sgd", output=clean))
    output = tmp_path / "report"
    status, _, err = run(capsys, "--from", folder, other, single, clean, "--output", output)
    assert status == 0, err
    summary = files.read_csv(output / "summary.csv")
    noisy = [row for row in summary if "30 % wrong" in row["task"]]
    assert {row["method"]: row["seeds"] for row in noisy} == {
        "sgd": "2",
        "sam": "2",
        "asam": "2",
        "bisam-log": "1",
    }
    assert [row["method"] for row in summary if "clean" in row["task"]] == ["sgd"]
    # Paired with the runs of another folder.
    asam = next(row for row in noisy if row["method"] == "asam")
    assert float(asam["same_epochs_low"]) <= float(asam["same_epochs_difference"])
    # The same report, made again.
    again = tmp_path / "again"
    run(capsys, "--from", folder, "--output", again)
    for name in ("summary.csv", "1-rho.svg", "report.md"):
        assert (again / name).read_text() == (folder / name).read_text()
    for name in ("runs.csv", "curves.csv"):
        assert (again / name).read_text() == (folder / name).read_text()
    # What was merged can be merged.
    more = tmp_path / "more"
    status, _, err = run(capsys, "--from", output, "--output", more)
    assert status == 0, err
    for name in ("summary.csv", "report.md"):
        assert (more / name).read_text() == (output / name).read_text()
    status, _, err = run(capsys, *GRID, "--output", again)
    assert status == 2
    assert "has no comparison that can go on" in err
    # All that is in a folder.
    everything = tmp_path / "everything"
    shutil.copytree(output, tmp_path / "all" / "merged")
    shutil.copytree(single, tmp_path / "all" / "single")
    status, _, err = run(capsys, "--from", tmp_path / "all", "--output", everything)
    assert status == 0, err
    assert (everything / "summary.csv").read_text() == (output / "summary.csv").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "sgd", "adahessian"], "--methods has no 'adahessian'"),
        (["--methods", "bisam-log+tanh"], "--methods has no 'bisam-log+tanh'"),
        (["--methods", "sam", "sam"], "--methods has sam twice"),
        (["--methods", "bisam-log", "sam+log"], "--methods has bisam-log twice"),
        (["--rho", "0.1", "0.1"], "--rho has 0.1 twice"),
        (["--rho", "0.1", "-1"], "--rho must be finite, at least 0, got -1.0"),
        (["--rho"], "--rho must have at least one value"),
        (["--tilt", "1"], "--tilt has no meaning for any of --methods"),
        (["--curvature", "1"], "--curvature"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--replicas-at-once", "0"], "--replicas-at-once must be at least 1"),
        (["--baseline", "asam"], "--baseline must be one of"),
        (["--batch-size", "5000"], "--batch-size must be at most the 1257"),
        (["--first-seed", "-1"], "--first-seed must be at least 0"),
        (["--methods", "sgd", "sampa", "--start-step", "20"], "--start-step cannot be used with"),
        (["--from"], "--from must name at least one folder"),
        (["--from", "missing"], "missing cannot be read as results"),
        (["--from", "missing", "--rho", "0.1"], "--from takes no option but"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *args, "--output", tmp_path / "new")
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert err.splitlines()[-1] == lines[0]
    assert not (tmp_path / "new").exists()


def test_results_that_differ_are_not_merged(finished, tmp_path, capsys):
    folder, _ = finished
    other = shutil.copytree(folder, tmp_path / "other")
    text = (other / "runs.csv").read_text().splitlines()
    header = text[0].split(",")
    row = text[1].split(",")
    row[header.index("test_accuracy")] = "0.123"
    (other / "runs.csv").write_text("\n".join([text[0], ",".join(row), *text[2:]]) + "\n")
    status, _, err = run(capsys, "--from", folder, other, "--output", tmp_path / "report")
    assert status == 2
    assert "two results of sgd with seed 0 that differ" in err
    assert not (tmp_path / "report").exists()


def test_runs_of_training_that_diverged_or_are_another_method(tmp_path, capsys):
    task = {"epochs": 2, "train_examples": 96, "method": "sparse-dynamic", "devices": 1}
    train.train(Config(**task, output=tmp_path / "good"))
    # In the middle of the first epoch.
    with pytest.raises(NonFiniteLossError):
        train.train(Config(**task, learning_rate=1e30, output=tmp_path / "bad"))
    output = tmp_path / "report"
    status, _, err = run(capsys, "--from", tmp_path / "good", tmp_path / "bad", "--output", output)
    assert status == 0, err
    text = (output / "report.md").read_text()
    (told,) = re.findall(r"sparse-dynamic with (.*): 1 of 1 runs diverged", text)
    assert "learning_rate 1e+30" in told
    assert "update_every 1" in told
    own = {"devices": 8, "parallelism": "shard_map", "batch_statistics": "per-device"}
    train.train(Config(**task | own, output=tmp_path / "own"))
    status, _, err = run(capsys, "--from", tmp_path / "own", "--output", tmp_path / "none")
    assert status == 2
    assert "per-device are another method" in err


def test_a_run_that_diverged_is_told_and_not_chosen(tmp_path, capsys):
    args = ["--methods", "sam", "--rho", 1e30, 0.05, *SMALL, "--output", tmp_path / "new"]
    status, _, err = run(capsys, *args)
    assert status == 0, err
    rows = files.read_csv(tmp_path / "new" / "runs.csv")
    assert {(row["rho"], row["status"]) for row in rows if row["method"] == "sam"} == {
        ("0.05", "finished"),
        ("1e+30", "diverged"),
    }
    text = (tmp_path / "new" / "report.md").read_text()
    assert "2 of 2 runs diverged" in text
    (chosen,) = [
        row["chosen"]
        for row in files.read_csv(tmp_path / "new" / "summary.csv")
        if row["method"] == "sam"
    ]
    assert chosen == "rho 0.05"
