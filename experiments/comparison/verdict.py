"""What a comparison says, in a few sentences."""

from collections.abc import Sequence

from experiments.comparison.significance import LEVEL, Difference, smallest_p_value
from experiments.comparison.table import Row, row_name
from experiments.config.methods import PLAIN


def in_short(rows: Sequence[Row], baseline: str) -> str:
    """Answers as Markdown: which is best, by how much, is it seed noise, what does it cost.

    Args:
        rows: the table, the best first.
        baseline: label of the method that the others are compared with.
    """
    best = rows[0]
    if best.test is None:
        return "No method has a result: see below."
    name, seeds = row_name(best, rows), best.test.count
    answers = [
        f"**Which is best?** {name}: {100 * best.test.mean:.2f} % test accuracy, the highest mean "
        f"over {seeds} {'seed' if seeds == 1 else 'seeds'}.{_near(best, rows)}",
        _by_how_much(best, rows, baseline),
        _noise(rows, baseline),
        _cost(best, rows, baseline),
    ]
    return "\n".join(f"* {answer}" for answer in answers if answer)


def _by_how_much(best: Row, rows: Sequence[Row], baseline: str) -> str:
    parts = []
    for difference, other in (
        (best.same_epochs, f"{baseline} with as many epochs"),
        (best.same_gradients, f"{PLAIN} with as many gradients (more epochs)"),
    ):
        if difference is not None:
            parts.append(f"{_points(difference.estimate.mean)} than {other}")
    if not parts and (second := next((row for row in rows[1:] if row.test), None)):
        gap = _mean(best) - _mean(second)
        parts.append(f"{_points(gap)} than the next, {row_name(second, rows)}")
    return f"**By how much?** {', and '.join(parts)}." if parts else ""


def _near(best: Row, rows: Sequence[Row]) -> str:
    """Names the rows that may be as good."""
    near = [
        row_name(row, rows)
        for row in rows
        if row is not best and row.test and best.test and row.test.high >= best.test.low
    ]
    if not near:
        return ""
    return (
        f" The 95 % intervals of {', '.join(near)} overlap with its own: to test the difference, "
        f"make the report again with --baseline {best.method}."
    )


def _mean(row: Row) -> float:
    assert row.test
    return row.test.mean


def _points(difference: float) -> str:
    return f"{abs(100 * difference):.1f} points {'more' if difference >= 0 else 'less'}"


def _noise(rows: Sequence[Row], baseline: str) -> str:
    """Says which differences are more than what another choice of seeds would change."""
    sentences = []
    others = (
        ("same_epochs", f"{baseline} with as many epochs"),
        ("same_gradients", f"{PLAIN} with as many gradients"),
    )
    made = [d for row in rows for d in (row.same_epochs, row.same_gradients) if d]
    if not made:
        return ""
    for kind, other in others:
        known = [(row_name(row, rows), d) for row in rows if (d := getattr(row, kind))]
        if not known:
            continue
        said = [
            f"{', '.join(names)} {word}"
            for sign, word in ((1, "better"), (-1, "worse"), (0, "not told apart"))
            if (names := [name for name, difference in known if difference.sign == sign])
        ]
        sentences.append(f"Against {other}: {'; '.join(said)}.")
    if not any(difference.sign for difference in made):
        seeds = max(difference.estimate.count for difference in made)
        smallest = smallest_p_value(seeds, len(made))
        if smallest > 1 - LEVEL:
            sentences.append(
                f"With {seeds} seeds and {len(made)} comparisons no p-value can be below "
                f"{smallest:.2g}: nothing could have been significant. Use more seeds."
            )
    told = "Some" if len({d.sign != 0 for d in made}) > 1 else "Yes" if made[0].sign else "No"
    return f"**More than seed noise?** {told}. {' '.join(sentences)}"


def _cost(best: Row, rows: Sequence[Row], baseline: str) -> str:
    gradients = best.reported.gradients
    text = f"**What does it cost?** {gradients:g} gradients per step"
    if gradients == 1:
        text = "**What does it cost?** 1 gradient per step"
    base = next((row for row in rows if row.method == baseline), None)
    if base is None or base is best:
        return f"{text}, {best.seconds:.3g} s per run."
    ratio = best.seconds / best.reported.steps / (base.seconds / base.reported.steps)
    return (
        f"{text}, {ratio:.1f} times the time of a step of {baseline}; {best.seconds:.3g} s per run."
    )


def compared(difference: Difference | None) -> str:
    """Returns a difference in words, as Markdown: bold or italic if it is significant."""
    if difference is None:
        return ""
    points = f"{100 * difference.estimate.mean:+.1f}"
    if difference.sign == 0:
        return f"not told apart ({points})"
    return f"**better** ({points})" if difference.sign > 0 else f"*worse* ({points})"
