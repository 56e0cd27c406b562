"""What is said before a comparison trains."""

import pytest

from experiments.comparison import plan
from experiments.comparison.grid import Grid
from experiments.comparison.table import DIFFERENCES, rows_of
from tests.experiments.comparison.made_up import comparison_of, eight


def planned(baseline="sgd", steps=39, **values):
    grid = Grid(**values)
    recipes = grid.recipes + grid.longer_plain(grid.recipes, steps)
    return plan.in_words(recipes, baseline, steps).splitlines()


def test_runs_seeds_and_gradients():
    first, second = planned(methods=("sgd", "sam", "gsam+log"), rho=(0.1, 0.2), epochs=10, seeds=8)
    # Plain, twice two radii, and plain for two and for three times as long.
    assert first.startswith("56 runs of sgd, sam, gsam+log; 8 seeds; ")
    gradients = 8 * 390 * (1 + 2 * 2 + 2 * 3 + 2 + 3)
    assert first.endswith(f" {gradients:,} batch gradients")
    assert second.startswith("8 seeds can show a difference: with 4 comparisons, the smallest")
    assert "is 0.031, and 0.05 is significant" in second


@pytest.mark.parametrize("seeds", [1, 2, 6])
def test_too_few_seeds(seeds):
    _, second = planned(methods=("sgd", "sam", "gsam"), epochs=10, seeds=seeds)
    assert second.startswith("too few seeds to show a difference")
    assert second.endswith("--seeds 8 is enough")


def test_nothing_to_compare():
    assert len(planned(methods=("sgd",), epochs=10)) == 1
    assert len(planned(baseline="sam", methods=("sam",), epochs=10)) == 1


def test_the_comparisons_are_those_of_the_table():
    results = [
        eight("sgd", 0.5, gradients=1),
        eight("sgd", 0.6, epochs=20, gradients=1),
        eight("sam", 0.7, rho=0.1),
        eight("gsam", 0.7, rho=0.1),
    ]
    rows = rows_of(comparison_of(*results))
    made = sum(getattr(row, name) is not None for row in rows for name in DIFFERENCES)
    _, second = planned(methods=("sgd", "sam", "gsam"), epochs=10, seeds=8)
    assert f"with {made} comparisons" in second
