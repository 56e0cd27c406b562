"""Writes the README's results from the comparisons in experiments/results.

python -m experiments.readme_table
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from experiments import files, results
from experiments.report import labels_in_words, setting_in_words, task_in_words
from experiments.results import Comparison
from experiments.significance import LEVEL
from experiments.table import PLAIN, Row, rows_of

ROOT = Path(__file__).parents[1]
RESULTS = Path("experiments") / "results"
_MARKED = re.compile(r"(<!-- results -->\n).*(<!-- end of results -->)", re.S)


def there(root: Path) -> list[Comparison]:
    """The comparisons, one a task, by the share of wrong labels."""
    folders = sorted(path.parent for path in (root / RESULTS).glob("*/comparison.json"))
    comparisons = results.merged(results.read(folder) for folder in folders)
    return sorted(comparisons, key=lambda comparison: comparison.task["label_noise"])


def test_accuracies(comparisons: Sequence[Comparison]) -> str:
    """A table for each data set and network, with a column for each share of wrong labels."""
    in_order = sorted(comparisons, key=_name_of, reverse=True)
    parts = [_table(list(group)) for _, group in itertools.groupby(in_order, _name_of)]
    return "\n\n".join(parts) + "\n"


def validation_accuracies(comparisons: Sequence[Comparison]) -> str:
    """A table for each task in which several radii were tried."""
    tables = []
    for comparison in comparisons:
        rows = [row for row in rows_of(comparison, PLAIN) if "rho" in row.swept]
        radii = sorted({c.values["rho"] for row in rows for c in row.candidates})
        if not rows:
            continue
        lines = [
            f"{task_in_words(comparison.task)}: validation accuracy in %",
            "",
            f"| rho | {' | '.join(f'{rho:g}' for rho in radii)} |",
            f"| --- |{' --- |' * len(radii)}",
        ]
        for row in sorted(rows, key=lambda row: row.method):
            means = {c.values["rho"]: c.validation.mean for c in row.candidates}
            best = row.best.values["rho"] if row.best else None
            cells = [f"{100 * means[rho]:.2f}" if rho in means else "" for rho in radii]
            marked = [
                f"**{cell}**" if rho == best else cell
                for rho, cell in zip(radii, cells, strict=True)
            ]
            lines.append(f"| {row.method} | {' | '.join(marked)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def updated(root: Path) -> dict[Path, str]:
    """The files with their tables as they should be."""
    comparisons = there(root)
    return {
        root / name: _MARKED.sub(
            lambda marked, text=text: marked[1] + text + marked[2], (root / name).read_text()
        )
        for name, text in (
            ("README.md", test_accuracies(comparisons)),
            ("docs/comparing.md", validation_accuracies(comparisons)),
        )
    }


def _name_of(comparison: Comparison) -> str:
    return setting_in_words(comparison.task)


def _table(comparisons: Sequence[Comparison]) -> str:
    columns = [
        {(row.method, row.epochs): row for row in rows_of(comparison, PLAIN)}
        for comparison in comparisons
    ]
    # Plain training first, with few epochs and then with more, and others as they were asked for.
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
    return "\n".join([*lines, "", "```sh", *commands, "```"])


def _seeds_of(columns: Sequence[dict[tuple[str, int], Row]]) -> str:
    counts = {row.test.count for column in columns for row in column.values() if row.test}
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def _cell(row: Row) -> str:
    if row.best is None or row.test is None:
        return "diverged"
    better = [
        difference is not None and p is not None and p <= 1 - LEVEL and difference.estimate.mean > 0
        for difference, p in zip((row.same_epochs, row.same_gradients), row.p_values, strict=True)
    ]
    text = f"{100 * row.test.mean:.2f}"
    if row.test.count > 1:
        text += f" ± {100 * row.test.standard_error:.2f}"
    text = f"**{text}**" if better[0] else text
    rho = row.best.values.get("rho")
    return text + (" †" if better[1] else "") + ("" if rho is None else f" (rho {rho:g})")


def main() -> None:
    """The command line."""
    for path, text in updated(ROOT).items():
        files.write(path, text)
        print(f"wrote the tables of {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
