"""The command that attacks trained networks, and its report."""

import pytest

from experiments import robustness
from experiments.measures.attacks import usual_attack
from experiments.measures.robustness_report import Check, Robust, write_robustness_report
from tests.experiments.comparison.made_up import TASK
from tests.experiments.rows import read_csv
from tests.experiments.script import call, refusal

pytestmark = pytest.mark.usefixtures("small_mlp")
ABOUT = {"command": "the command", "versions": {"jax": "1.2.3"}, "hardware": {}, "examples": 100}


def test_the_command(finished, tmp_path, capsys):
    folder = tmp_path / "new"
    args = ["--candidates", "all", "--examples", 100, "--restarts", 1, "--output", folder]
    status, out, err = call(robustness.main, capsys, finished / "grid", *args)
    assert status == 0, err
    assert out.endswith(f"wrote {folder / 'report.md'} and {folder / 'report.html'}\n")
    rows = read_csv(folder / "robustness.csv")
    names = ["sgd", "sam, rho 0.1", "sam, rho 0.5"]
    assert {row["network"] for row in rows} == set(names)
    worst = {
        (row["network"], row["seed"], row["norm"], float(row["radius"])): float(row["accuracy"])
        for row in rows
        if row["loss"] == "worst"
    }
    assert len(worst) == sum(row["loss"] == "worst" for row in rows) == 3 * 2 * 5
    for name in names:
        for seed in "01":
            for norm, small, large in (("linf", 1.0, 2.0), ("l2", 16.0, 32.0)):
                clean = worst[name, seed, "", 0.0]
                assert clean >= worst[name, seed, norm, small] >= worst[name, seed, norm, large]
    text = (folder / "report.md").read_text()
    assert text.count("accuracy falls to 0 as the radius grows") == 3
    assert text.count("| holds |") >= 6
    assert "first 100 test examples" in text
    assert "It is no defense" in text


def accuracies(network, values, radius=2.0):
    attack = ("linf", radius, 10) if radius else ("", 0.0, 0)
    return [Robust(network, seed, *attack, "", "worst", value) for seed, value in enumerate(values)]


def test_the_report(tmp_path):
    robust = accuracies("sgd", [0.9, 0.8, 0.7], 0) + accuracies("sgd", [0.5, 0.4, 0.3])
    robust += accuracies("sam", [0.9, 0.8, 0.7], 0) + accuracies("sam", [0.61, 0.5, 0.39])
    # The same attack with one random start: no part of the table.
    of_checks = accuracies("sam", [1.0] * 3)
    checks = [Check("it holds", "sgd", "1 %", True), Check("it does not", "sgd", "2 %", False)]
    attacks = [usual_attack("linf", 2.0)]
    write_robustness_report(tmp_path, robust, attacks, checks, of_checks, "sgd", TASK, ABOUT)
    text = (tmp_path / "report.md").read_text()
    assert "| sgd | 3 | 80.00 ± 24.84 | 40.00 ± 24.84 |" in text
    assert "<br>+0.00 ± 0.00 |" in text
    assert "50.00 ± 27.33<br>**+10.00 ± 2.48** |" in text
    assert "| it holds | sgd | 1 % | holds |" in text
    assert "| it does not | sgd | 2 % | **does not hold** |" in text
    assert "linf 2/255 with step 0.5/255" in text
    assert len(read_csv(tmp_path / "robustness.csv")) == 12
    assert len(read_csv(tmp_path / "checks.csv")) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--linf", "0"], "--linf must be numbers greater than 0 and at most 255, got 0"),
        (["--linf", "256"], "--linf must be numbers greater than 0 and at most 255"),
        (["--l2", "-1"], "--l2 must be numbers greater than 0, got -1"),
        (["--steps", "0"], "--steps must be finite, at least 1, got 0"),
        (["--restarts", "0"], "--restarts must be finite, at least 1, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(args, message, finished, capsys):
    assert message in refusal(robustness.main, capsys, finished / "run0", *args)
