"""The command that measures strength along a training, and its report."""

import dataclasses
import re

import pytest

from experiments import strength
from experiments.measures.strength_report import by_radius, differences_of, write_strength_report
from experiments.measures.strength_run import Measured
from tests.experiments.comparison.made_up import TASK
from tests.experiments.rows import read_csv
from tests.experiments.script import call, refusal

SMALL = ["--train-examples", 128, "--seeds", 2, "--epochs", 2, "--at", 0, 2, "--batches", 2]
SMALL += ["--radii", 0.1, 0.5, "--measured-mu", 1, "--measured-alpha", 0.1, "--rho", 0.2]


def made_up(rises, ascended, method="sgd"):
    """One result per seed: the rise of the error after one epoch at rho 0.1."""
    return [
        Measured(method, seed, 1, ascended, 0.1, 0.3, rise, 0.9) for seed, rise in enumerate(rises)
    ]


BASE = made_up([0.10, 0.20, 0.30, 0.40], "ce")
STRONGER = made_up([0.12, 0.23, 0.32, 0.43], "log")
SAME = made_up([0.12, 0.18, 0.32, 0.38], "tanh")
WEAKER = made_up([0.08, 0.17, 0.28, 0.37], "steep")


def test_differences_are_paired_by_seed():
    known = differences_of([*BASE, *reversed(STRONGER), *WEAKER])
    value = known["sgd", 1, "log", 0.1]
    assert value.count == 4
    assert value.mean == pytest.approx(0.025)
    assert value.low > 0 > known["sgd", 1, "steep", 0.1].high


def test_each_seed_counts_once_by_radius():
    other = [dataclasses.replace(m, epoch=2, error_rise=m.error_rise + 0.1) for m in BASE]
    later = [dataclasses.replace(m, epoch=2, error_rise=m.error_rise + 0.2) for m in STRONGER]
    value = by_radius([*BASE, *STRONGER, *other, *later])["log", 0.1]
    assert value.count == 4
    assert value.mean == pytest.approx((0.025 + 0.125) / 2)


def test_the_report(tmp_path):
    about = {"command": "the command", "versions": {"jax": "1.2.3"}, "hardware": {"device": "cpu"}}
    write_strength_report(tmp_path, [*BASE, *STRONGER, *SAME, *WEAKER], TASK, about)
    text = (tmp_path / "report.md").read_text()
    assert "| ascended | rho 0.1 |" in text
    assert "| log | **+2.50 ± 0.92** |" in text
    assert re.search(r"^\| tanh \| [+-]0\.00 ± 3\.67 \|$", text, re.M)
    assert "| ce | 0.900 | +25.00 |" in text
    assert "| log | 0.900 | **+2.50 ± 0.92** |" in text
    assert "| steep | 0.900 | *-2.50 ± 0.92* |" in text
    assert "```sh\nthe command\n```" in text
    assert len(read_csv(tmp_path / "strength.csv")) == 16
    assert "data:image/svg+xml" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("small_mlp")
def test_the_command(tmp_path, capsys):
    folder = tmp_path / "new"
    args = [*SMALL, "--methods", "sgd", "sam", "--output", folder]
    status, out, err = call(strength.main, capsys, *args)
    assert status == 0, err
    assert out.endswith(f"wrote {folder / 'report.md'} and {folder / 'report.html'}\n")
    rows = read_csv(folder / "strength.csv")
    # Methods, seeds, epochs, losses, radii.
    assert len(rows) == 2 * 2 * 2 * 3 * 2
    assert {row["method"] for row in rows} == {"sgd", "sam, rho 0.2"}

    # All methods start from the same network of a seed, and then differ.
    def rises(method, epoch):
        return [r["loss_rise"] for r in rows if (r["method"], r["epoch"]) == (method, epoch)]

    assert rises("sgd", "0") == rises("sam, rho 0.2", "0")
    assert rises("sgd", "2") != rises("sam, rho 0.2", "2")
    assert "## Networks trained by sam, rho 0.2" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--radii", "-1"], "--radii must be numbers greater than 0"),
        (["--measured-alpha", "0"], "--measured-alpha must be numbers greater than 0"),
        (["--at", "99"], "--at must be at most the 50 epochs of training, got 99"),
        (["--batches", "99"], "--batches must be at most the 39 of an epoch, got 99"),
        (["--batches", "0"], "--batches must be finite, at least 1"),
        (["--methods", "nothing"], "--methods has no 'nothing'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(strength.main, capsys, *args)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "kept").touch()
    err = refusal(strength.main, capsys, *SMALL, "--output", tmp_path)
    assert "--output must be a new folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
