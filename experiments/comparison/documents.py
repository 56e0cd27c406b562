"""The tables and the plot in docs/, made from results/."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from experiments.comparison import plots, words
from experiments.comparison.merging import merged
from experiments.comparison.reading import read_results
from experiments.comparison.results import Comparison
from experiments.comparison.significance import Difference, Estimate
from experiments.comparison.table import Row, row_name, rows_of
from experiments.comparison.words import labels_in_words, setting_in_words, task_in_words
from experiments.config.methods import PLAIN

RESULTS = Path("results")
_SHOWN = (PLAIN, "sam", "bisam-log", "bisam-tanh")
# In words, the baseline, and the difference in the row.
_QUESTIONS = (
    ("against sgd for as many epochs", PLAIN, "same_epochs"),
    ("against sgd for as many gradients", PLAIN, "same_gradients"),
    ("against SAM for as many epochs", "sam", "same_epochs"),
)
_MARKED = re.compile(r"(<!-- results -->\n).*(<!-- end of results -->)", re.S)


def there(root: Path, *, study: bool) -> list[Comparison]:
    """Returns comparisons in results/, by increasing label noise: study-* and text-*, or *-noise-*.

    Those of one task are one comparison.
    """
    found = sorted((root / RESULTS).glob("*"))
    studies = [folder for folder in found if folder.name.startswith(("study-", "text-"))]
    others = [folder for folder in found if "-noise-" in folder.name and folder not in studies]
    folders = studies if study else others
    comparisons = merged(itertools.chain.from_iterable(map(read_results, folders)))
    return sorted(comparisons, key=lambda comparison: comparison.task["label_noise"])


def test_accuracies(comparisons: Sequence[Comparison]) -> str:
    """Returns one table per data set and network, with a column per share of wrong labels."""
    in_order = sorted(comparisons, key=_name_of, reverse=True)
    parts = [_table(list(group)) for _, group in itertools.groupby(in_order, _name_of)]
    return "\n\n".join(parts) + "\n"


def differences_in_points(comparisons: Sequence[Comparison]) -> str:
    """Returns, per data set and network, a table of differences for each of three questions."""
    in_order = sorted(comparisons, key=_name_of)
    parts = []
    for name, members in itertools.groupby(in_order, _name_of):
        group = list(members)
        for question, baseline, kind in _QUESTIONS:
            if any(baseline not in {r.method for r in known.results} for known in group):
                continue
            columns = [rows_of(known, baseline) for known in group]
            heads = [labels_in_words(known.task) for known in group]
            lines = {}
            for number, rows in enumerate(columns):
                for row in rows:
                    if difference := getattr(row, kind):
                        cells = lines.setdefault(row_name(row, rows), [""] * len(group))
                        cells[number] = _in_points(difference)
            table = [["method", *heads], ["---", *["---"] * len(heads)]]
            table += [[method, *cells] for method, cells in sorted(lines.items())]
            parts += [f"**{name}**: {question}", words.table(table)]
        commands = dict.fromkeys(about["command"] for c in group for about in c.origins)
        parts.append(words.shell(commands))
    return "\n\n".join(parts) + "\n"


def validation_accuracies(comparisons: Sequence[Comparison]) -> str:
    """Returns one table per task that has several radii."""
    tables = []
    for comparison in comparisons:
        rows = [row for row in rows_of(comparison) if "rho" in row.swept]
        known = [c for row in rows for c in row.candidates if "rho" in c.values]
        radii = sorted({c.values["rho"] for c in known})
        if not rows:
            continue
        lines = [
            f"{task_in_words(comparison.task)}: validation accuracy in %",
            "",
            f"| rho | {' | '.join(f'{rho:g}' for rho in radii)} |",
            f"| --- |{' --- |' * len(radii)}",
        ]
        for row in sorted(rows, key=lambda row: (row.method, row.epochs)):
            cells = _by_radius(row)
            lines.append(
                f"| {row_name(row, rows)} | {' | '.join(cells.get(rho, '') for rho in radii)} |"
            )
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def wrong_labels(comparisons: Sequence[Comparison]) -> str:
    """Draws the test accuracies of the setting with the most shares of wrong labels, as SVG."""
    in_order = sorted(comparisons, key=_name_of)
    groups = [list(group) for _, group in itertools.groupby(in_order, _name_of)]
    lines: dict[str, dict[float, Estimate]] = {}
    for comparison in max(groups, key=len):
        rows = rows_of(comparison)
        for row in rows:
            if row.test and row.method in _SHOWN:
                line = lines.setdefault(row_name(row, rows), {})
                line[comparison.task["label_noise"]] = row.test
    return plots.over_label_noise(lines)


def updated(root: Path) -> dict[Path, str]:
    """Returns the new text of each file that has tables, and the plot."""
    comparisons, study = there(root, study=False), there(root, study=True)
    drawn = {root / "docs" / "wrong-labels.svg": wrong_labels(comparisons)}
    return drawn | {
        root / name: _MARKED.sub(
            lambda marked, text=text: marked[1] + text + marked[2], (root / name).read_text()
        )
        for name, text in (
            ("docs/results.md", test_accuracies(comparisons)),
            ("docs/comparing.md", validation_accuracies(comparisons)),
            ("docs/pays.md", differences_in_points(study)),
        )
    }


def _by_radius(row: Row) -> dict[float, str]:
    """Returns validation accuracies by radius. Other hyperparameters have their chosen values."""
    if row.chosen is None:
        return {}
    rest = {name: value for name, value in row.chosen.values.items() if name != "rho"}
    cells = {}
    for candidate in row.candidates:
        if "rho" in candidate.values and rest.items() <= candidate.values.items():
            mean = f"{100 * candidate.validation.mean:.2f}"
            chosen = candidate.values == row.chosen.values
            text = "diverged" if candidate.diverged else f"**{mean}**" if chosen else mean
            cells[candidate.values["rho"]] = text
    return cells


def _name_of(comparison: Comparison) -> str:
    return setting_in_words(comparison.task)


def _table(comparisons: Sequence[Comparison]) -> str:
    columns = [
        {(row.method, row.epochs): row for row in rows_of(comparison)} for comparison in comparisons
    ]
    # Plain training comes first.
    names = list(dict.fromkeys((r.method, r.epochs) for c in comparisons for r in c.results))
    names.sort(key=lambda name: name[0] != PLAIN)
    heads = [labels_in_words(comparison.task) for comparison in comparisons]
    lines = [
        f"**{_name_of(comparisons[0])}**: test accuracy in %, mean ± standard error over "
        f"{_seeds_of(columns)} seeds",
        "",
        f"| method | epochs | {' | '.join(heads)} |",
        f"| --- | ---: |{' --- |' * len(heads)}",
    ]
    for name in names:
        cells = [_cell(column[name]) if name in column else "" for column in columns]
        lines.append(f"| {name[0]} | {name[1]} | {' | '.join(cells)} |")
    commands = dict.fromkeys(about["command"] for c in comparisons for about in c.origins)
    return "\n".join([*lines, "", words.shell(commands)])


def _seeds_of(columns: Sequence[dict[tuple[str, int], Row]]) -> str:
    counts = {row.test.count for column in columns for row in column.values() if row.test}
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def _cell(row: Row) -> str:
    if row.best is None or row.test is None:
        return "diverged" if row.chosen is None else "not confirmed"
    text = f"{100 * row.test.mean:.2f}"
    if row.test.count > 1:
        text += f" ± {100 * row.test.standard_error:.2f}"
    emphasis = {1: "**", 0: "", -1: "*"}[_sign_of(row.same_epochs)]
    mark = {1: " †", 0: "", -1: " ‡"}[_sign_of(row.same_gradients)]
    rho = row.best.values.get("rho")
    return f"{emphasis}{text}{emphasis}{mark}" + ("" if rho is None else f" (rho {rho:g})")


def _in_points(difference: Difference) -> str:
    """Returns a difference in points with its interval: bold or italic if it is significant."""
    value = difference.estimate
    mark = {1: "**", 0: "", -1: "*"}[difference.sign]
    low, high = 100 * value.low, 100 * value.high
    return f"{mark}{100 * value.mean:+.2f}{mark} [{low:+.2f}, {high:+.2f}]"


def _sign_of(difference: Difference | None) -> int:
    return 0 if difference is None else difference.sign
