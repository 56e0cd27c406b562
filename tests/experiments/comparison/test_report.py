"""The report in words and pictures, from made-up results."""

import base64
import dataclasses
import re

import pytest

from experiments.comparison import report
from experiments.comparison.results import DIVERGED
from tests.experiments.comparison.made_up import (
    SAM,
    SGD,
    SGD_LONGER,
    TASK,
    comparison_of,
    eight,
)
from tests.experiments.rows import read_csv


def text_of(folder, *comparisons, baseline=None):
    report.write_report(folder, report.sections_of(comparisons, baseline))
    return (folder / "report.md").read_text()


def with_curves(results):
    """Two epochs each."""
    curve = [
        {"epoch": epoch, "loss": 1.0 / epoch, "validation_accuracy": 0.3 * epoch}
        for epoch in (1, 2)
    ]
    return [dataclasses.replace(result, curve=curve) for result in results]


def test_the_report_in_words(tmp_path):
    task = TASK | {"base": "adamw", "label_noise": 0.2}
    text = text_of(tmp_path, comparison_of(SGD, SGD_LONGER, SAM, task=task))
    assert text.startswith("# Comparison on digits\n")
    assert "## digits, mlp, batch 32, base adamw, 20 % wrong labels" in text
    lines = text.splitlines()
    first = lines.index(
        "* **Which is best?** sam: 70.88 % test accuracy, the highest mean over 8 seeds."
    )
    assert lines[first + 1 : first + 4] == [
        "* **By how much?** 20.0 points more than sgd with as many epochs, and 10.0 points more "
        "than sgd with as many gradients (more epochs).",
        "* **More than seed noise?** Yes. Against sgd with as many epochs: sam better. Against sgd "
        "with as many gradients: sam better.",
        "* **What does it cost?** 2 gradients per step, 1.0 times the time of a step of sgd; "
        "0.195 s per run.",
    ]
    assert lines[first + 5] == "![Test accuracy of each method, and what it cost](1-accuracy.svg)"
    assert (
        "| sam | rho 0.1 | 70.88 | 69.88 | **better** (+20.0) | **better** (+10.0) | 780 | 0.20 s |"
    ) in lines
    assert (
        "| sam | 8 | 0.5 (8) | 70.88 ± 0.30 [70.18, 71.57] | 70.88 ± 0.30 [70.18, 71.57] | "
        "**+20.00 [+20.00, +20.00], p = 0.0156** | **+10.00 [+10.00, +10.00], p = 0.0156** |"
    ) in lines
    assert "```sh\nthe command\n```\n\njax 1.2.3. device: abacus." in text


def test_better_worse_and_neither_are_told_apart(tmp_path):
    worse, same = eight("asam", 0.4, rho=1.0), eight("gsam", 0.5, rho=0.1)
    text = text_of(tmp_path, comparison_of(SGD, SAM, worse, same))
    told = "Some. Against sgd with as many epochs: sam better; asam worse; gsam not told apart."
    assert f"* **More than seed noise?** {told}\n" in text
    assert "| asam | rho 1 | 40.88 | 39.88 | *worse* (-10.0) |  |" in text
    words, numbers = [line for line in text.splitlines() if line.startswith("| gsam")]
    assert "| not told apart (+0.0) |  |" in words
    assert numbers.endswith("| +0.00 [+0.00, +0.00], p = 1 |  |")
    text = text_of(tmp_path, comparison_of(SGD, same))
    assert "seed noise?** No. Against sgd with as many epochs: gsam not told apart." in text
    assert "nothing could have been significant" not in text


def test_what_may_be_as_good_as_the_best_is_named(tmp_path):
    near, far = eight("gsam", 0.699, rho=0.1), eight("asam", 0.6, rho=1.0)
    text = text_of(tmp_path, comparison_of(SGD, SAM, near, far))
    assert "intervals of gsam overlap with its own" in text
    assert "with --baseline sam." in text
    assert "overlap" not in text_of(tmp_path, comparison_of(SGD, SAM, far))


def test_the_best_may_be_the_baseline(tmp_path):
    text = text_of(tmp_path, comparison_of(SGD, eight("asam", 0.4, rho=1.0)))
    assert "**Which is best?** sgd: 50.88 %" in text
    assert "**By how much?** 10.0 points more than the next, asam." in text
    assert "**What does it cost?** 1 gradient per step, 0.195 s per run." in text


def test_values_that_only_some_runs_have(tmp_path):
    mixed = [*eight("sam", 0.5, rho=0.1), *eight("sam", 0.6, rho=0.1, mu=1.0)]
    text = text_of(tmp_path, comparison_of(mixed))
    assert "The mu chosen for sam is the smallest or largest value tried" in text
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["1-accuracy.svg", "1-mu.svg"]


def test_few_pairs_and_few_seeds_are_told(tmp_path):
    asam = eight("asam", 0.9, rho=1.0)[:3] + eight("asam", 0.95, rho=2.0)[:2]
    text = text_of(tmp_path, comparison_of(SGD, asam))
    assert "asam with rho 2: there are 2 of 3 runs, so it could not be chosen." in text
    assert "With 3 seeds and 1 comparisons no p-value can be below 0.25" in text
    (row,) = [row for row in read_csv(tmp_path / "summary.csv") if row["method"] == "asam"]
    assert (row["same_epochs_seeds"], row["same_gradients_seeds"]) == ("3", "")
    text = text_of(tmp_path, comparison_of(SGD[:3], eight("asam", 0.9, rho=1.0)))
    assert "p = 0.25 (3 seeds) |" in text


def test_one_seed_has_no_interval(tmp_path):
    text = text_of(tmp_path, comparison_of(SGD[:1], SAM[:1]))
    assert "nan" not in text
    assert "over 1 seed." in text
    assert "| 70.00 | 69.00 |" in text


def test_methods_that_diverged(tmp_path):
    lost = {"status": DIVERGED, "validation_accuracy": None, "test_accuracy": None}
    grid = [*SAM, *eight("sam", 0.6, rho=0.2)]
    sam = [dataclasses.replace(result, **lost) for result in grid]
    text = text_of(tmp_path, comparison_of(with_curves(SGD), sam))
    assert "sam with rho 0.1: 8 of 8 runs diverged, so it could not be chosen." in text
    assert "| sam | diverged |  |  |  |  | 780 |" in text
    assert "No method has a result: see below." in text_of(tmp_path, comparison_of(sam))


def test_the_summary(tmp_path):
    text_of(tmp_path, comparison_of(SGD, SGD_LONGER, SAM, eight("sam", 0.4, rho=0.2)))
    rows = read_csv(tmp_path / "summary.csv")
    assert [(row["method"], row["epochs"], row["chosen"]) for row in rows] == [
        ("sam", "10", "rho 0.1"),
        ("sgd", "20", ""),
        ("sgd", "10", ""),
    ]
    sam = rows[0]
    for name, value in {
        "validation_accuracy": 0.70875,
        "same_epochs_difference": 0.2,
        "same_epochs_p_value": 4 / 256,
        "same_gradients_difference": 0.1,
        "same_gradients_p_value": 4 / 256,
    }.items():
        assert float(sam[name]) == pytest.approx(value)


def test_the_page_needs_no_other_file(tmp_path):
    grid = with_curves([*SAM, *eight("sam", 0.6, rho=0.2)])
    text_of(tmp_path, comparison_of(with_curves(SGD), grid))
    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    images = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert sorted(images) == ["1-accuracy.svg", "1-curves.svg", "1-rho.svg"]
    encoded = "data:image/svg+xml;base64,"
    decoded = [base64.b64decode(s.removeprefix(encoded)).decode() for s in sources]
    assert sorted(decoded) == sorted(images.values())
    assert page.count("<table>") == 2
    assert page.count("<tr>") == 2 * (1 + len(read_csv(tmp_path / "summary.csv")))
