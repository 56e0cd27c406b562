"""The table of a comparison: the chosen candidate of each method, and its differences."""

import dataclasses
import math
from collections.abc import Sequence

from experiments.comparison import significance
from experiments.comparison.results import FINISHED, Comparison, Result
from experiments.comparison.significance import Candidate, Difference, Estimate
from experiments.config.methods import PLAIN
from experiments.system.command_line import ArgumentError

DIFFERENCES = ("same_epochs", "same_gradients")


@dataclasses.dataclass
class Row:
    """A method in the table.

    Attributes:
        method: label of the method.
        epochs: number of epochs.
        candidates: one for each set of hyperparameter values, with the seeds that choose.
        chosen: the candidate of the best validation accuracy; None if all diverged.
        best: the reported runs with the chosen values, see :func:`significance.reported`; None if
            there are none.
        test: test accuracy of the reported candidate.
        lost: number of runs that were to confirm the values, and diverged.
        same_epochs: difference from the baseline with the same number of epochs.
        same_gradients: difference from plain training with the same number of gradients.
    """

    method: str
    epochs: int
    candidates: list[Candidate]
    chosen: Candidate | None
    best: Candidate | None
    test: Estimate | None
    lost: int = 0
    same_epochs: Difference | None = None
    same_gradients: Difference | None = None

    @property
    def reported(self) -> Result:
        """A run of the reported candidate."""
        return (self.best or self.candidates[0]).results[0]

    @property
    def last_test(self) -> Estimate | None:
        """Test accuracy after the last epoch; None where it was not recorded."""
        known = [result.last_test_accuracy for result in self.best.results] if self.best else []
        return significance.estimate(known) if known and None not in known else None

    @property
    def seconds(self) -> float:
        """Mean time of a run, its share if several runs were computed at once."""
        runs = (self.best or self.candidates[0]).results
        return sum(r.milliseconds_per_step * r.steps for r in runs) / len(runs) / 1000

    @property
    def batch_gradients(self) -> int:
        """Number of batch gradients of a run."""
        return round(self.reported.gradients * self.reported.steps)

    @property
    def swept(self) -> list[str]:
        """The hyperparameters with several values."""
        tried = [candidate.values for candidate in self.candidates]
        names = dict.fromkeys(name for values in tried for name in values)
        return [name for name in names if len({values.get(name) for values in tried}) > 1]

    def at_the_edge(self, name: str) -> bool:
        """Returns whether the chosen value is the smallest or the largest of several."""
        if self.chosen is None or name not in self.swept:
            return False
        tried = [c.values[name] for c in self.candidates if name in c.values]
        return self.chosen.values.get(name) in (min(tried), max(tried))


def usual_baseline(methods: Sequence[str]) -> str:
    """Returns plain training if it is one of the methods, otherwise the first."""
    return PLAIN if PLAIN in methods else methods[0]


def baseline_of(comparison: Comparison) -> str:
    """Returns the usual baseline of the methods that were trained."""
    return usual_baseline([result.method for result in comparison.results])


def rows_of(comparison: Comparison, baseline: str | None = None) -> list[Row]:
    """Returns the rows of the table, the best method first.

    Args:
        comparison: the results of one task.
        baseline: label of the method that the others are compared with. See :func:`baseline_of`
            for the default.

    Raises:
        ArgumentError: if the baseline was not trained.
    """
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in comparison.results:
        groups.setdefault((result.method, result.epochs), []).append(result)
    baseline = baseline or baseline_of(comparison)
    if baseline not in (method for method, _ in groups):
        there = ", ".join(sorted({method for method, _ in groups}))
        raise ArgumentError(f"--baseline must be one of {there}, got {baseline}")
    # Runs that chose their values are not compared with runs that did not.
    some_confirm = any(result.confirms for result in comparison.results)
    rows = {}
    for (method, epochs), results in groups.items():
        choosing = [result for result in results if not result.confirms] or results
        chosen = significance.chosen(choosing)
        best = significance.reported(results, chosen)
        if some_confirm and not any(result.confirms for result in results):
            best = None
        test = best and significance.estimate([r.test_accuracy for r in best.results])
        known = significance.candidates(choosing)
        lost = sum(result.confirms and result.status != FINISHED for result in results)
        rows[method, epochs] = Row(method, epochs, known, chosen, best, test, lost)
    for row in rows.values():
        row.same_epochs = _difference(row, rows.get((baseline, row.epochs)))
        if row.reported.gradients > 1:
            plain = rows.get((PLAIN, round(row.epochs * row.reported.gradients)))
            row.same_gradients = _difference(row, plain)
    _correct(list(rows.values()))
    order = sorted(rows.values(), key=lambda row: row.test.mean if row.test else -math.inf)
    return order[::-1]


def row_name(row: Row, rows: Sequence[Row]) -> str:
    """Returns the method, with its epochs if several rows have this method."""
    several = len({other.epochs for other in rows if other.method == row.method}) > 1
    return f"{row.method}, {row.epochs} epochs" if several else row.method


def _difference(row: Row, other: Row | None) -> Difference | None:
    if other is None or other is row or row.best is None or other.best is None:
        return None
    return significance.difference(row.best, other.best)


def _correct(rows: list[Row]) -> None:
    """Corrects the p-values. All comparisons of a table are one family."""
    made = [(row, name, d) for row in rows for name in DIFFERENCES if (d := getattr(row, name))]
    corrected = significance.holm([difference.p_value for *_, difference in made])
    for (row, name, difference), p in zip(made, corrected, strict=True):
        setattr(row, name, difference._replace(p_value=p))
