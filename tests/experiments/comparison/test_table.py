"""The rows of a table, from made-up results."""

import dataclasses

import pytest

from experiments.comparison import table
from experiments.comparison.merging import merged
from experiments.system.command_line import ArgumentError
from tests.experiments.comparison.made_up import SAM, SGD, SGD_LONGER, comparison_of, eight


def rows(*groups, baseline=None):
    made = table.rows_of(comparison_of(*groups), baseline)
    return {(row.method, row.epochs): row for row in made}


def test_same_epochs_and_same_gradients():
    made = rows(SGD, SGD_LONGER, SAM)
    assert list(made) == [("sam", 10), ("sgd", 20), ("sgd", 10)]
    sam = made["sam", 10]
    assert sam.same_epochs.estimate.mean == pytest.approx(0.2)
    assert sam.same_gradients.estimate.mean == pytest.approx(0.1)
    # 2 of 256 signs, twice for two comparisons.
    assert sam.same_epochs.p_value == sam.same_gradients.p_value == pytest.approx(4 / 256)
    for epochs in (10, 20):
        assert made["sgd", epochs].same_epochs is made["sgd", epochs].same_gradients is None


def test_gradients_are_those_of_what_was_chosen():
    few = eight("tilted", 0.6, gradients=4, num_samples=2.0)
    many = eight("tilted", 0.8, gradients=8, num_samples=4.0)
    longer = [
        eight("sgd", accuracy, epochs=epochs, gradients=1)
        for epochs, accuracy in ((40, 0.5), (80, 0.7))
    ]
    row = rows(SGD, *longer, few, many)["tilted", 10]
    assert row.same_gradients.estimate.mean == pytest.approx(0.1)
    assert row.swept == ["num_samples"]


def test_another_baseline():
    made = rows(SGD, SGD_LONGER, SAM, eight("asam", 0.75, rho=1.0), baseline="sam")
    assert made["asam", 10].same_epochs.estimate.mean == pytest.approx(0.05)
    assert made["sgd", 10].same_epochs.estimate.mean == pytest.approx(-0.2)
    assert made["sgd", 20].same_epochs is None
    with pytest.raises(ArgumentError, match="--baseline must be one of sam, sgd, got gsam"):
        rows(SGD, SAM, baseline="gsam")


def test_without_plain_training_the_first_method_is_the_baseline():
    made = rows(SAM, eight("asam", 0.75, rho=1.0))
    assert made["asam", 10].same_epochs.estimate.mean == pytest.approx(0.05)
    assert made["asam", 10].same_gradients is None


def test_the_edge_of_a_grid():
    grid = [eight("sam", accuracy, rho=rho) for rho, accuracy in ((0.1, 0.5), (0.2, 0.6))]
    assert rows(*grid)["sam", 10].at_the_edge("rho")
    inside = rows(*grid, eight("sam", 0.4, rho=0.4))["sam", 10]
    assert not inside.at_the_edge("rho")
    assert not rows(SAM)["sam", 10].at_the_edge("rho")


def test_epochs_tell_rows_of_one_method_apart():
    made = list(rows(SGD, SGD_LONGER, SAM).values())
    names = [table.row_name(row, made) for row in made]
    assert names == ["sam", "sgd, 20 epochs", "sgd, 10 epochs"]


def confirming(results, shift=0.0):
    """The same runs with eight fresh seeds, of other accuracies."""
    return [
        dataclasses.replace(
            result, seed=result.seed + 8, confirms=True, test_accuracy=result.test_accuracy + shift
        )
        for result in results
    ]


def test_only_fresh_seeds_are_reported():
    weak, strong = eight("sam", 0.6, rho=0.1), eight("sam", 0.7, rho=0.2)
    made = rows(SGD, weak, strong, confirming(SGD, 0.1), confirming(strong, -0.05))
    sam = made["sam", 10]
    assert sam.chosen.values == sam.best.values == {"rho": 0.2}
    assert [result.seed for result in sam.chosen.results] == list(range(8))
    assert [result.seed for result in sam.best.results] == list(range(8, 16))
    assert sam.test.mean == pytest.approx(0.70875 - 0.05)
    assert sam.same_epochs.estimate.mean == pytest.approx(0.2 - 0.15)
    assert sam.at_the_edge("rho")
    # Accuracies of the fresh seeds choose nothing.
    made = rows(SGD, weak, strong, confirming(weak, 0.3), confirming(strong))
    assert made["sam", 10].best.values == {"rho": 0.2}


def test_what_is_not_confirmed_is_not_compared():
    made = rows(SGD, SAM, eight("asam", 0.9, rho=1.0), confirming(SGD), confirming(SAM))
    assert made["asam", 10].test is made["asam", 10].same_epochs is made["asam", 10].best is None
    assert made["sam", 10].same_epochs is not None
    (diverged, *others) = confirming(SAM)
    lost = dataclasses.replace(diverged, status="diverged", test_accuracy=None)
    row = rows(SGD, SAM, confirming(SGD), [lost, *others])["sam", 10]
    assert (row.test, row.lost) == (None, 1)


def test_a_seed_does_not_choose_and_confirm():
    others = confirming(eight("sam", 0.7, rho=0.2))
    fresh = [dataclasses.replace(result, seed=result.seed - 1) for result in others]
    with pytest.raises(ArgumentError, match="--from has seed 7 of sam among the seeds that choose"):
        merged([comparison_of(SAM), comparison_of(fresh)])
    assert len(merged([comparison_of(SAM), comparison_of(confirming(SAM))])) == 1
    same = [dataclasses.replace(result, confirms=True) for result in SAM]
    for folders in ((SAM, same), (same, SAM)):
        with pytest.raises(ArgumentError, match="--from has seed 0 of sam among the seeds"):
            merged(map(comparison_of, folders))
