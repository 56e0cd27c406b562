"""The comparison, as its users run it."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import jax
import pytest

from experiments import compare
from experiments.comparison import results
from experiments.comparison.grid_run import GridRun
from experiments.comparison.reading import read_results
from experiments.comparison.replicas import Replicas
from experiments.comparison.results import Comparison
from experiments.system import machine, seals
from tests.experiments.comparison.command import SMALL, quickly, run
from tests.experiments.rows import read_csv
from tests.experiments.script import ROOT

GRID = ["--methods", "sgd", "sam", "--rho", 0.05, 0.5, 1e30, "--epochs", 2, *SMALL]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quickly():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick):
    """A comparison, and what was printed. With the largest radius, sam diverges."""
    folder = tmp_path_factory.mktemp("finished") / "comparison"
    printed = tmp_path_factory.mktemp("printed") / "out"
    with pytest.MonkeyPatch.context() as patch, printed.open("w") as out:
        patch.setattr(sys, "stdout", out)
        compare.main([*map(str, GRID), "--output", str(folder)])
    return folder, printed.read_text()


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


def test_the_grid(finished):
    rows = read_csv(finished[0] / "runs.csv")
    runs = [(row["method"], row["epochs"], row["rho"], row["seed"]) for row in rows]
    expected = [("sgd", epochs, "", seed) for epochs in ("2", "4") for seed in "01"]
    expected += [("sam", "2", rho, seed) for rho in ("0.05", "0.5", "1e+30") for seed in "01"]
    assert sorted(runs) == sorted(expected)
    assert {(row["method"], row["gradients"]) for row in rows} == {("sgd", "1"), ("sam", "2")}
    curves = read_csv(finished[0] / "curves.csv")
    assert len(curves) == sum(int(row["epochs"]) for row in rows)
    for row in rows:
        if row["rho"] == "1e+30":
            assert (row["status"], row["test_accuracy"]) == ("diverged", "")
            continue
        assert row["status"] == "finished"
        course = [float(c["validation_accuracy"]) for c in curves if c["run"] == row["run"]]
        assert float(row["validation_accuracy"]) == max(course)
        assert course[int(row["checkpoint_epoch"]) - 1] == max(course)
    assert len({(row["validation_accuracy"], row["test_accuracy"]) for row in rows}) > 4


def test_what_is_printed(finished):
    folder, out = finished
    assert re.search(r"^sam, 2 epochs: 6 runs, 6 at once, compiled in \d+\.\d s$", out, re.M)
    assert re.search(r"^sgd, 4 epochs: 2 runs, 2 at once, compiled in \d+\.\d s$", out, re.M)
    assert out.splitlines()[-1] == f"wrote {folder}/report.md and {folder}/report.html"


def test_the_report(finished):
    folder, _ = finished
    text = (folder / "report.md").read_text()
    assert "## digits, 96 examples, mlp, batch 32, 30 % wrong labels" in text
    assert re.search(r"^sam with .*rho 1e\+30.*: 2 of 2 runs diverged", text, re.M)
    assert "no p-value can be below" in text
    summary = read_csv(folder / "summary.csv")
    names = re.findall(r"^\| ([\w-]+)[ ,]", text.split("### The numbers")[0], re.M)
    assert [row["method"] for row in summary] == names[2:]
    of = {(row["method"], row["epochs"]): float(row["test_accuracy"]) for row in summary}
    (sam,) = [row for row in summary if row["method"] == "sam"]
    for name, epochs in (("same_epochs", "2"), ("same_gradients", "4")):
        expected = of["sam", "2"] - of["sgd", epochs]
        assert float(sam[f"{name}_difference"]) == pytest.approx(expected)
    about = json.loads((folder / "comparison.json").read_text())
    command = shlex.join(["python", "-m", "experiments.compare", *map(str, GRID)])
    assert about["command"] == f"{command} --output {folder}"
    assert about["command"] in text
    assert about["versions"]["jax"] in text


@pytest.mark.parametrize("version", [jax.__version__, "0.0.1"], ids=["the same", "another"])
def test_what_is_resumed_elsewhere_is_told(version, copy, capsys, monkeypatch):
    lines = (copy / "runs.csv").read_text().splitlines(keepends=True)
    (copy / "runs.csv").write_text("".join(lines[:-2]))
    about = json.loads((copy / "comparison.json").read_text())
    about["versions"]["jax"] = version
    (copy / "comparison.json").write_text(json.dumps(about))
    seals.accept(copy, ["comparison.json", "runs.csv", "curves.csv"])
    monkeypatch.setattr(GridRun, "train", lambda self: None)
    status, _, err = run(capsys, *GRID, "--output", copy)
    assert status == 0, err
    text = (copy / "report.md").read_text()
    assert f"jax {version}" in text
    assert "Not complete: 8 of 10 runs." in text
    continued = json.loads((copy / "comparison.json").read_text()).get("continued")
    if version == jax.__version__:
        assert continued is None
    else:
        assert continued == [{"versions": machine.versions(), "hardware": machine.hardware()}]
        now = f"bisam_jax {about['versions']['bisam_jax']}, jax {jax.__version__}"
        assert f"Continued with: {now}" in text


def test_a_comparison_that_names_the_default_optimizer_is_resumed(copy, capsys, monkeypatch):
    """As versions did that had the same default for all networks."""
    about = json.loads((copy / "comparison.json").read_text())
    assert about["grid"]["base"] is None
    about["grid"]["base"] = "sgd"
    (copy / "comparison.json").write_text(json.dumps(about))
    seals.accept(copy, ["comparison.json", "runs.csv", "curves.csv"])
    monkeypatch.setattr(GridRun, "train", lambda self: None)
    status, _, err = run(capsys, *GRID, "--output", copy)
    assert status == 0, err
    status, _, err = run(capsys, *GRID, "--base", "adamw", "--output", copy)
    assert status != 0
    assert "its --base is sgd, not adamw" in err


def test_what_a_network_cannot_do_is_refused_before_the_first_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(GridRun, "train", lambda self: pytest.fail("trained"))
    args = ["--methods", "sgd", "sam@group-size=1", *SMALL, "--output", tmp_path / "new"]
    status, _, err = run(capsys, *args)
    assert status != 0
    assert "--group-size must be at least 2 for mlp" in err


def test_a_finished_comparison_is_not_computed_again(copy, capsys, monkeypatch):
    names = ("runs.csv", "report.md", "comparison.json")
    before = {name: (copy / name).read_text() for name in names}
    # The largest file, which not everybody keeps.
    (copy / "curves.csv").unlink()
    monkeypatch.setattr(Replicas, "epoch", None)
    status, _, err = run(capsys, *GRID, "--output", copy)
    assert status == 0, err
    assert {name: (copy / name).read_text() for name in names} == before
    assert "1-curves.svg" in before["report.md"]


def test_results_are_merged(finished, tmp_path, capsys):
    folder, _ = finished
    (known,) = read_results(folder)
    for name, task, method in (
        ("asam", known.task, "asam"),
        ("clean", known.task | {"label_noise": 0.0}, "sam"),
    ):
        made = [dataclasses.replace(r, method=method) for r in known.results if r.method == "sam"]
        (tmp_path / name).mkdir()
        results.write_merged(tmp_path / name, [Comparison(task, made, known.origins)])
    parts, output = [folder, tmp_path / "asam", tmp_path / "clean"], tmp_path / "report"
    status, _, err = run(capsys, "--from", *parts, "--output", output)
    assert status == 0, err
    summary = read_csv(output / "summary.csv")
    noisy = {(r["method"], r["epochs"]): r for r in summary if "30 % wrong" in r["task"]}
    assert set(noisy) == {("sgd", "2"), ("sgd", "4"), ("sam", "2"), ("asam", "2")}
    assert [row["method"] for row in summary if "clean" in row["task"]] == ["sam"]
    # Paired with the runs of another folder.
    for name in ("same_epochs_difference", "same_epochs_low", "same_gradients_difference"):
        assert noisy["asam", "2"][name] == noisy["sam", "2"][name]


def test_a_report_is_made_again(finished, tmp_path, capsys):
    folder, _ = finished
    again, nested = tmp_path / "all" / "again", tmp_path / "nested"
    assert run(capsys, "--from", folder, "--output", again)[0] == 0
    # What was merged can be merged, and all that is in a folder.
    assert run(capsys, "--from", again.parent, "--output", nested)[0] == 0
    for made in (again, nested):
        for name in ("summary.csv", "1-rho.svg", "report.md", "runs.csv", "curves.csv"):
            assert (made / name).read_text() == (folder / name).read_text()
    status, _, err = run(capsys, *GRID, "--output", again)
    assert status == 2
    assert "has no comparison that can be resumed" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "sgd", "adahessian"], "--methods has no 'adahessian'"),
        (["--methods", "sgd", "bisam-lgo"], "Did you mean bisam-log?"),
        (["--methods", "bisam-log+tanh"], "--methods has no 'bisam-log+tanh'"),
        (["--methods", "sam", "sam"], "--methods has sam twice"),
        (["--methods", "bisam-log", "sam+log"], "--methods has bisam-log twice"),
        (["--rho", "0.1", "0.1"], "--rho has 0.1 twice"),
        (["--rho", "0.1", "-1"], "--rho must be finite, at least 0, got -1.0"),
        (["--rho"], "--rho must have at least one value"),
        (["--tilt", "1"], "--tilt has no meaning for any of --methods"),
        (["--curvature", "1"], "--curvature"),
        (["--seeds", "0"], "--seeds must be finite, at least 1"),
        (["--replicas-at-once", "0"], "--replicas-at-once must be finite, at least 1"),
        (["--baseline", "asam"], "--baseline must be one of"),
        (["--batch-size", "5000"], "--batch-size must be at most the 1257"),
        (["--first-seed", "-1"], "--first-seed must be finite, at least 0"),
        (["--methods", "sgd", "sampa@start-step=20"], "--start-step cannot be used with"),
        (["--from"], "--from must name at least one folder"),
        (["--from", "missing"], "missing has no results"),
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


def test_cores_are_devices_unless_the_user_says_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *option: asked.append(option))
    machine.make_cores_devices()
    assert not asked
    monkeypatch.setenv("XLA_FLAGS", "")
    machine.make_cores_devices()
    assert asked == [("jax_num_cpu_devices", machine.cores())]


def test_in_a_process_of_its_own_every_core_is_a_device():
    code = "import jax; from experiments.system import machine; machine.make_cores_devices(); "
    code += "print(jax.device_count())"
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], stdout=-1, text=True, env=environment)
    assert int(process.stdout) == machine.cores()
