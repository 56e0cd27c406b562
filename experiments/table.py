"""The table of a comparison: each method's chosen candidate, and what it is compared with."""

import dataclasses
import math
from collections.abc import Sequence

from experiments import significance
from experiments.config import ArgumentError
from experiments.methods import PLAIN
from experiments.results import Comparison, Result
from experiments.significance import Candidate, Difference, Estimate


@dataclasses.dataclass
class Row:
    """A method in the table.

    Attributes:
        method: its label.
        epochs: how many it was trained for.
        candidates: one for each set of values of its hyperparameters.
        best: the candidate that is reported; None if all diverged.
        test: its test accuracy.
        same_epochs: against the baseline, trained for as many epochs.
        same_gradients: against plain training with as many gradients.
        p_values: of the two, corrected; None where there is no comparison.
    """

    method: str
    epochs: int
    candidates: list[Candidate]
    best: Candidate | None
    test: Estimate | None
    same_epochs: Difference | None = None
    same_gradients: Difference | None = None
    p_values: list[float | None] = dataclasses.field(default_factory=lambda: [None, None])

    @property
    def reported(self) -> Result:
        """Any run of the candidate that is reported."""
        return (self.best or self.candidates[0]).results[0]

    @property
    def swept(self) -> list[str]:
        """The hyperparameters of which several values were tried."""
        tried = [candidate.values for candidate in self.candidates]
        names = dict.fromkeys(name for values in tried for name in values)
        return [name for name in names if len({values.get(name) for values in tried}) > 1]

    def at_the_edge(self, name: str) -> bool:
        """Whether what was chosen is the smallest or the largest of several values tried."""
        if self.best is None or name not in self.swept:
            return False
        tried = [c.values[name] for c in self.candidates if name in c.values]
        return self.best.values.get(name) in (min(tried), max(tried))


def baseline_of(comparison: Comparison) -> str:
    """Plain training if it is there, otherwise the first method."""
    methods = [result.method for result in comparison.results]
    return PLAIN if PLAIN in methods else methods[0]


def rows_of(comparison: Comparison, baseline: str | None = None) -> list[Row]:
    """The table, the best first.

    Args:
        comparison: of one task.
        baseline: the method that the others are compared with; by default see :func:`baseline_of`.

    Raises:
        ArgumentError: if it was not trained.
    """
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in comparison.results:
        groups.setdefault((result.method, result.epochs), []).append(result)
    baseline = baseline or baseline_of(comparison)
    if baseline not in (method for method, _ in groups):
        there = ", ".join(sorted({method for method, _ in groups}))
        raise ArgumentError(f"--baseline must be one of {there}, got {baseline}")
    rows = {}
    for (method, epochs), results in groups.items():
        best = significance.chosen(results)
        test = best and significance.estimate([r.test_accuracy for r in best.results])
        known = significance.candidates(results)
        rows[method, epochs] = Row(method, epochs, known, best, test)
    for row in rows.values():
        row.same_epochs = _difference(row, rows.get((baseline, row.epochs)))
        if row.reported.gradients > 1:
            plain = rows.get((PLAIN, round(row.epochs * row.reported.gradients)))
            row.same_gradients = _difference(row, plain)
    _correct(list(rows.values()))
    order = sorted(rows.values(), key=lambda row: row.test.mean if row.test else -math.inf)
    return order[::-1]


def label_of(row: Row, rows: Sequence[Row]) -> str:
    """The method, with its epochs where it was trained for several numbers of them."""
    several = len({other.epochs for other in rows if other.method == row.method}) > 1
    return f"{row.method}, {row.epochs} epochs" if several else row.method


def _difference(row: Row, other: Row | None) -> Difference | None:
    if other is None or other is row or row.best is None or other.best is None:
        return None
    return significance.difference(row.best, other.best)


def _correct(rows: list[Row]) -> None:
    """All comparisons of a table are one family."""
    made = [
        (row, number, difference.p_value)
        for row in rows
        for number, difference in enumerate((row.same_epochs, row.same_gradients))
        if difference is not None
    ]
    for (row, number, _), p in zip(made, significance.holm([p for *_, p in made]), strict=True):
        row.p_values[number] = p
