"""Writes the README's results from the comparisons in experiments/results.

python -m experiments.readme_table
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from experiments import files, results
from experiments.results import Comparison
from experiments.significance import LEVEL
from experiments.table import PLAIN, Row, rows_of

ROOT = Path(__file__).parents[1]
RESULTS = Path("experiments") / "results"
_MARKED = re.compile(r"(<!-- results -->\n).*(<!-- end of results -->)", re.S)


def tables(root: Path) -> str:
    """Of all comparisons: a table for each task, with a column for each share of wrong labels."""
    folders = sorted(path.parent for path in (root / RESULTS).glob("*/comparison.json"))
    comparisons = results.merged(results.read(folder) for folder in folders)
    comparisons.sort(key=lambda comparison: comparison.task["label_noise"])
    parts = []
    for _, group in itertools.groupby(sorted(comparisons, key=_name_of, reverse=True), _name_of):
        parts.append(_table(list(group)))
    return "\n\n".join(parts) + "\n"


def update(root: Path) -> bool:
    """Writes the tables between the README's marks; whether that changed it."""
    text = (root / "README.md").read_text()
    updated = _MARKED.sub(lambda marked: marked[1] + tables(root) + marked[2], text)
    if updated != text:
        files.write(root / "README.md", updated)
    return updated != text


def _name_of(comparison: Comparison) -> str:
    task = comparison.task
    examples = f", {task['train_examples']:,} examples" if task["train_examples"] else ""
    return f"{task['dataset']}{examples}, {task['model']}"


def _table(comparisons: Sequence[Comparison]) -> str:
    columns = [
        {(row.method, row.epochs): row for row in rows_of(comparison, PLAIN)}
        for comparison in comparisons
    ]
    # Plain training first, with few epochs and then with more, and others as they were asked for.
    names = list(dict.fromkeys((r.method, r.epochs) for c in comparisons for r in c.results))
    names.sort(key=lambda name: name[0] != PLAIN)
    noises = [comparison.task["label_noise"] for comparison in comparisons]
    heads = [f"{100 * noise:g} % wrong labels" if noise else "clean labels" for noise in noises]
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
    text = f"{100 * row.test.mean:.2f} ± {100 * row.test.standard_error:.2f}"
    text = f"**{text}**" if better[0] else text
    rho = row.best.values.get("rho")
    return text + (" †" if better[1] else "") + ("" if rho is None else f" (rho {rho:g})")


def main() -> None:
    """The command line."""
    print("changed README.md" if update(ROOT) else "README.md is up to date")


if __name__ == "__main__":
    main()
