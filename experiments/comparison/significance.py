"""Estimates and tests of differences between methods.

A method's hyperparameters are those of the best mean validation accuracy. With these, the test
accuracies of two methods, of fresh seeds if there are any, are paired by seed and compared by an
exact permutation test and Student's interval. The test only assumes that, under the null
hypothesis, both signs of a difference are equally likely.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from experiments.comparison.results import FINISHED, Result

LEVEL = 0.95
# Up to this number of seeds, the test tries all signs. Beyond it, it draws as many at random.
EXACT_SEEDS = 16


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: mean of the values.
        standard_error: standard error of the mean; NaN for one value.
        low: lower end of the 95 % interval; NaN for one value.
        high: upper end of the 95 % interval; NaN for one value.
        count: number of values.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    count: int


class Candidate(NamedTuple):
    """A method with one set of hyperparameter values.

    Attributes:
        values: hyperparameters by name.
        results: one per seed, by increasing seed.
        diverged: number of runs that diverged.
    """

    values: dict[str, float]
    results: list[Result]
    diverged: int

    @property
    def validation(self) -> Estimate:
        """The validation accuracy of the finished runs. It means nothing if a run diverged."""
        return estimate([r.validation_accuracy for r in self.results if r.status == FINISHED])


class Difference(NamedTuple):
    """The mean of paired differences, and the probability of one as large by chance."""

    estimate: Estimate
    p_value: float

    @property
    def sign(self) -> int:
        """1 if significantly positive, -1 if significantly negative, otherwise 0."""
        if self.p_value > 1 - LEVEL:
            return 0
        return 1 if self.estimate.mean > 0 else -1


def estimate(values: Sequence[float | None]) -> Estimate:
    """Returns mean, standard error and Student's 95 % interval."""
    numbers = np.asarray(values, np.float64)
    count, mean = len(numbers), float(numbers.mean()) if len(numbers) else float("nan")
    if count < 2:
        return Estimate(mean, np.nan, np.nan, np.nan, count)
    error = float(numbers.std(ddof=1) / np.sqrt(count))
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Estimate(mean, error, mean - half, mean + half, count)


def estimates_of(
    values: Iterable[tuple[Any, Any, float]],
) -> dict[Any, dict[Any, Estimate]]:
    """Returns estimates by name and place, of `(name, place, value)` for every seed."""
    known: dict[Any, dict[Any, list[float | None]]] = {}
    for name, place, value in values:
        known.setdefault(name, {}).setdefault(place, []).append(value)
    return {
        name: {place: estimate(found) for place, found in line.items()}
        for name, line in known.items()
    }


def candidates(results: Sequence[Result]) -> list[Candidate]:
    """Returns one candidate for each set of values, in the order of the values."""
    by_values: dict[tuple, list[Result]] = {}
    for result in results:
        by_values.setdefault(tuple(sorted(result.values.items())), []).append(result)
    return [
        Candidate(
            dict(values),
            sorted(group, key=lambda result: result.seed),
            sum(result.status != FINISHED for result in group),
        )
        for values, group in sorted(by_values.items())
    ]


def chosen(results: Sequence[Result]) -> Candidate | None:
    """Returns the candidate of the best mean validation accuracy; of equals, the smaller values.

    A candidate with a diverged run, or with fewer seeds than another, is never chosen.
    """
    known = candidates(results)
    seeds = max(len(candidate.results) for candidate in known)
    able = [c for c in known if not c.diverged and len(c.results) == seeds]
    # Rounded, since sums of equal accuracies in another order differ in their last digit.
    return max(able, key=lambda candidate: round(candidate.validation.mean, 12), default=None)


def reported(results: Sequence[Result], chosen: Candidate | None) -> Candidate | None:
    """Returns the runs that are tested: those that confirm the chosen values, with fresh seeds.

    If no run confirms anything, these are the runs that chose.
    """
    confirming = [result for result in results if result.confirms]
    if chosen is None or not confirming:
        return chosen
    found = [c for c in candidates(confirming) if c.values == chosen.values and not c.diverged]
    return found[0] if found else None


def difference(ours: Candidate, theirs: Candidate) -> Difference | None:
    """Compares test accuracies on common seeds; returns None for fewer than two of them."""
    others = {result.seed: result.test_accuracy for result in theirs.results}
    pairs = [(r.test_accuracy, others[r.seed]) for r in ours.results if r.seed in others]
    if len(pairs) < 2:
        return None
    first, second = np.asarray(pairs, np.float64).T
    return Difference(estimate(list(first - second)), p_value(first - second))


def p_value(differences: np.ndarray) -> float:
    """Returns the two-sided p-value of the mean of paired differences, over all their signs."""
    count = len(differences)
    test = scipy.stats.permutation_test(
        (differences,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=2 ** min(count, EXACT_SEEDS),
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected by Holm's method.

    The probability of any false positive is then at most the level.

    References:
        Holm, `A Simple Sequentially Rejective Multiple Test Procedure
        <https://www.jstor.org/stable/4615733>`_, 1979
    """
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.maximum.accumulate(factors * np.asarray(p_values)[order])
    result = np.empty(len(p_values))
    result[order] = np.minimum(corrected, 1)
    return result.tolist()


def smallest_p_value(seeds: int, comparisons: int) -> float:
    """Returns the smallest p-value that the test can have, after Holm's correction."""
    return min(1.0, comparisons * 2.0 ** (1 - seeds))
