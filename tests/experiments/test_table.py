"""The table of a comparison, from results that are made up."""

import dataclasses

import pytest

from experiments import files, report, result_tables, table
from experiments.config import ArgumentError, Config
from experiments.results import DIVERGED, Comparison, task_of
from tests.experiments.test_significance import BLANK

TASK = task_of(Config().resolved())


def results_of(method, accuracy, *, epochs=10, gradients=2, spread=0.01, **values):
    """Eight runs; validation accuracies are test accuracies."""
    return [
        dataclasses.replace(
            BLANK,
            method=method,
            epochs=epochs,
            gradients=gradients,
            values=values,
            seed=seed,
            validation_accuracy=accuracy + spread * (seed % 3),
            test_accuracy=accuracy + spread * (seed % 3),
        )
        for seed in range(8)
    ]


def rows(*results, baseline=None):
    comparison = Comparison(TASK, [result for group in results for result in group], [])
    return {(row.method, row.epochs): row for row in table.rows_of(comparison, baseline)}


SGD = results_of("sgd", 0.5, gradients=1)
SGD_LONGER = results_of("sgd", 0.6, epochs=20, gradients=1)
SAM = results_of("sam", 0.7, rho=0.1)


def test_same_epochs_and_same_gradients():
    made = rows(SGD, SGD_LONGER, SAM)
    assert list(made) == [("sam", 10), ("sgd", 20), ("sgd", 10)]
    sam = made["sam", 10]
    assert sam.same_epochs.estimate.mean == pytest.approx(0.2)
    assert sam.same_gradients.estimate.mean == pytest.approx(0.1)
    # 2 of 256 signs, twice for two comparisons.
    assert sam.p_values == pytest.approx([4 / 256] * 2)
    assert made["sgd", 10].p_values == made["sgd", 20].p_values == [None, None]


def test_gradients_are_those_of_what_was_chosen():
    few = results_of("tilted", 0.6, gradients=4, num_samples=2.0)
    many = results_of("tilted", 0.8, gradients=8, num_samples=4.0)
    longer = [
        results_of("sgd", accuracy, epochs=epochs, gradients=1)
        for epochs, accuracy in ((40, 0.5), (80, 0.7))
    ]
    row = rows(SGD, *longer, few, many)["tilted", 10]
    assert row.same_gradients.estimate.mean == pytest.approx(0.1)
    assert row.swept == ["num_samples"]


def test_another_baseline():
    made = rows(SGD, SGD_LONGER, SAM, results_of("asam", 0.75, rho=1.0), baseline="sam")
    assert made["asam", 10].same_epochs.estimate.mean == pytest.approx(0.05)
    assert made["sgd", 10].same_epochs.estimate.mean == pytest.approx(-0.2)
    assert made["sgd", 20].same_epochs is None
    with pytest.raises(ArgumentError, match="--baseline must be one of sam, sgd, got gsam"):
        rows(SGD, SAM, baseline="gsam")


def test_without_plain_training_the_first_method_is_the_baseline():
    made = rows(SAM, results_of("asam", 0.75, rho=1.0))
    assert made["asam", 10].same_epochs.estimate.mean == pytest.approx(0.05)
    assert made["asam", 10].same_gradients is None


def test_the_edge_of_a_grid():
    grid = [results_of("sam", accuracy, rho=rho) for rho, accuracy in ((0.1, 0.5), (0.2, 0.6))]
    assert rows(*grid)["sam", 10].at_the_edge("rho")
    inside = rows(*grid, results_of("sam", 0.4, rho=0.4))["sam", 10]
    assert not inside.at_the_edge("rho")
    assert not rows(SAM)["sam", 10].at_the_edge("rho")


def test_values_that_only_some_runs_have(tmp_path):
    mixed = [*results_of("sam", 0.5, rho=0.1), *results_of("sam", 0.6, rho=0.1, mu=1.0)]
    row = rows(mixed)["sam", 10]
    assert row.swept == ["mu"]
    assert row.at_the_edge("mu")
    comparison = Comparison(TASK, mixed, [])
    report.write(tmp_path, report.tables_of([comparison], None))
    assert (tmp_path / "1-mu.svg").exists()


def test_the_report_in_words(tmp_path):
    comparison = Comparison(TASK | {"base": "adamw", "label_noise": 0.2}, [*SGD, *SAM], [])
    report.write(tmp_path, report.tables_of([comparison], None))
    text = (tmp_path / "report.md").read_text()
    assert "## digits, mlp, batch 32, base adamw, 20 % wrong labels" in text
    assert "Against sgd, same epochs: significantly better: sam." in text
    assert "| sam | rho 0.1 | 8 | 10 |" in text


def test_few_pairs_and_few_seeds_are_told(tmp_path):
    asam = results_of("asam", 0.9, rho=1.0)[:3] + results_of("asam", 0.95, rho=2.0)[:2]
    comparison = Comparison(TASK, [*SGD, *asam], [])
    report.write(tmp_path, report.tables_of([comparison], None))
    text = (tmp_path / "report.md").read_text()
    assert "asam with rho 2: there are 2 of 3 runs, so it could not be chosen." in text
    assert "With 3 seeds and 1 comparisons no p-value can be below 0.25" in text
    (row,) = [row for row in files.read_csv(tmp_path / "summary.csv") if row["method"] == "asam"]
    assert (row["same_epochs_seeds"], row["same_gradients_seeds"]) == ("3", "")
    more = Comparison(TASK, [*SGD[:3], *results_of("asam", 0.9, rho=1.0)], [])
    report.write(tmp_path, report.tables_of([more], None))
    assert "p = 0.25 (3 seeds) |" in (tmp_path / "report.md").read_text()


def test_accuracies_in_the_documentation():
    worse = results_of("asam", 0.4, rho=1.0)
    like_sgd = results_of("gsam", 0.5, rho=0.1)
    results = [*SGD, *SGD_LONGER, *SAM, *worse, *like_sgd]
    about = {"command": "the command"}
    text = result_tables.test_accuracies([Comparison(TASK, results, [about])])
    for line in (
        "| sgd | 10 | 50.88 ± 0.30 |",
        "| sgd | 20 | 60.87 ± 0.30 |",
        "| sam | 10 | **70.88 ± 0.30** † (rho 0.1) |",
        "| asam | 10 | *40.88 ± 0.30* ‡ (rho 1) |",
        "| gsam | 10 | 50.88 ± 0.30 ‡ (rho 0.1) |",
        "the command",
    ):
        assert line in text.splitlines()


def test_radii_in_the_documentation():
    """Of several hyperparameters the others are those that were chosen."""
    results = [*SGD]
    for rho, mu, accuracy in ((0.1, 1, 0.5), (0.2, 1, 0.6), (0.1, 2, 0.7), (0.2, 2, 0.4)):
        results += results_of("bisam-log", accuracy, spread=0, rho=rho, mu=float(mu))
    grown = results_of("bisam-log", 0.9, rho=0.4, mu=2.0)
    results += [dataclasses.replace(result, status=DIVERGED) for result in grown[:1]] + grown[1:]
    text = result_tables.validation_accuracies([Comparison(TASK, results, [])])
    assert "| rho | 0.1 | 0.2 | 0.4 |" in text
    assert "| bisam-log | **70.00** | 40.00 | diverged |" in text


def test_one_seed_has_no_interval(tmp_path):
    comparison = Comparison(TASK, [SGD[0], SAM[0]], [])
    report.write(tmp_path, report.tables_of([comparison], None))
    text = (tmp_path / "report.md").read_text()
    assert "nan" not in text
    assert "| 70.00 | 70.00 |" in text
