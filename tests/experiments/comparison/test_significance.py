"""Estimates and tests, against other formulas for them."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from experiments.comparison import significance
from experiments.comparison.results import DIVERGED
from tests.experiments.comparison.made_up import results_of


def of_seeds(rho, validation, test=None):
    """A result for each validation accuracy, by increasing seed."""
    return results_of(validation=validation, test=test or validation, rho=rho)


def test_estimate_is_students():
    values = [0.2, 0.5, 0.4, 0.9]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    result = significance.estimate(values)
    np.testing.assert_allclose((result.low, result.high), expected)
    np.testing.assert_allclose(result.standard_error, scipy.stats.sem(values))
    assert result.mean == pytest.approx(0.5)
    assert result.count == 4


def test_one_value_has_no_interval():
    result = significance.estimate([0.5])
    assert result.mean == 0.5
    assert np.isnan([result.standard_error, result.low, result.high]).all()


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),  # only +++ and --- are as far from 0
        ([1.0] * 10, 2 / 1024),
        ([-1.0] * 10, 2 / 1024),
        ([1.0, -1.0], 1.0),
        ([0.0, 0.0, 0.0], 1.0),
        ([3.0, 1.0, -1.0], 6 / 8),  # all but (3, -1, -1) and its opposite
    ],
)
def test_all_signs_are_tried(differences, expected):
    assert significance.p_value(np.asarray(differences)) == pytest.approx(expected)


def test_many_seeds_are_sampled():
    differences = np.random.default_rng(0).normal(0.4, 1, 30)
    expected = scipy.stats.ttest_1samp(differences, 0).pvalue
    result = significance.p_value(differences)
    assert result == pytest.approx(expected, rel=0.2)
    assert result == significance.p_value(differences)


def test_holm():
    # Times 4, 3, 2 and 1 from the smallest on, and never below the one before.
    result = significance.holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(result, [0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([]) == []


def test_what_is_chosen_does_not_depend_on_the_test_split():
    low = of_seeds(0.1, [0.6, 0.7], test=[0.9, 0.9])
    high = of_seeds(0.2, [0.7, 0.8], test=[0.1, 0.1])
    best = significance.chosen(low + high)
    assert best.values == {"rho": 0.2}
    assert [result.seed for result in best.results] == [0, 1]


def test_among_equals_the_smaller_value_is_chosen():
    results = of_seeds(0.2, [0.7, 0.6]) + of_seeds(0.1, [0.6, 0.7])
    assert significance.chosen(results).values == {"rho": 0.1}
    # The same accuracies from other seeds, whose means differ in their last digit.
    accuracies = [0.3, 0.2, 0.1]
    assert np.mean(accuracies) < np.mean(accuracies[::-1])
    results = of_seeds(0.2, accuracies[::-1]) + of_seeds(0.1, accuracies)
    assert significance.chosen(results).values == {"rho": 0.1}


def test_what_diverged_or_is_incomplete_is_not_chosen():
    diverged = of_seeds(0.3, [0.9, 0.9])
    diverged[1] = dataclasses.replace(diverged[1], status=DIVERGED, validation_accuracy=None)
    incomplete = of_seeds(0.4, [0.9])
    complete = of_seeds(0.1, [0.5, 0.5])
    assert significance.chosen(diverged + incomplete + complete).values == {"rho": 0.1}
    assert significance.chosen(diverged) is None


def test_differences_are_paired_by_seed():
    ours, theirs = of_seeds(0.1, [0.9, 0.5, 0.7]), of_seeds(0.2, [0.8, 0.4, 0.6])
    first = significance.Candidate({}, ours, 0)
    second = significance.Candidate({}, theirs[::-1] + of_seeds(0.2, [0.0] * 5)[3:], 0)
    result = significance.difference(first, second)
    assert result.estimate.mean == pytest.approx(0.1)
    assert result.estimate.standard_error == pytest.approx(0, abs=1e-12)
    assert result.estimate.count == 3
    assert significance.difference(first, significance.Candidate({}, ours[:1], 0)) is None
