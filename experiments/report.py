"""The report of a comparison: Markdown, and from it one HTML file that holds everything."""

import base64
import dataclasses
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt

from experiments import files, plots
from experiments.config import Config
from experiments.results import Comparison
from experiments.significance import EXACT_SEEDS, LEVEL, Difference, Estimate
from experiments.table import PLAIN, Row, baseline_of, label_of, rows_of


class Table(NamedTuple):
    """A comparison, the method that others are compared with, and the rows."""

    comparison: Comparison
    baseline: str
    rows: list[Row]


def tables_of(comparisons: Sequence[Comparison], baseline: str | None) -> list[Table]:
    """Each comparison with the name of its baseline and its rows; see :func:`rows_of`."""
    return [
        Table(comparison, baseline or baseline_of(comparison), rows_of(comparison, baseline))
        for comparison in comparisons
    ]


def write(folder: Path, tables: Sequence[Table]) -> None:
    """Writes report.md, report.html, summary.csv and the plots.

    Args:
        folder: an existing one.
        tables: of several tasks.
    """
    comparisons = [table.comparison for table in tables]
    images: dict[str, str] = {}
    parts = [_section(table, number, images) for number, table in enumerate(tables, 1)]
    text = "\n\n".join(["# " + _title(comparisons), *parts, _METHOD, _origins(comparisons)]) + "\n"
    for name, image in images.items():
        files.write(folder / name, image)
    files.write(folder / "report.md", text)
    files.write(folder / "report.html", _page(text, images))
    _write_summary(folder / "summary.csv", tables)


def task_in_words(task: dict[str, Any]) -> str:
    """What was learnt."""
    return f"{setting_in_words(task)}, {labels_in_words(task)}"


def labels_in_words(task: dict[str, Any]) -> str:
    """How many labels are wrong."""
    noise = task["label_noise"]
    return f"{100 * noise:g} % wrong labels" if noise else "clean labels"


def setting_in_words(task: dict[str, Any]) -> str:
    """All of a task but its labels: what is not as usual for the data set is named."""
    usual = dataclasses.asdict(Config(dataset=task["dataset"]).resolved())
    parts = [task["dataset"], task["model"], f"batch {task['batch_size']}"]
    if task["train_examples"]:
        parts.insert(1, f"{task['train_examples']:,} examples")
    shown = ("dataset", "model", "batch_size", "train_examples", "label_noise")
    for name in set(task) - set(shown):
        if task[name] != usual[name]:
            parts.append(f"{name.replace('_', ' ')} {task[name]}")
    return ", ".join([*parts[:3], *sorted(parts[3:])])


def _section(table: Table, number: int, images: dict[str, str]) -> str:
    comparison, baseline, rows = table
    names = {label_of(row, rows): row for row in rows}
    chosen = {label: row.best for label, row in names.items()}
    parts = [f"## {task_in_words(comparison.task)}", _in_short(rows, baseline), _table(rows)]
    swept = sorted({name for row in rows for name in row.swept})
    for name in swept:
        if edge := [label for label, row in names.items() if row.at_the_edge(name)]:
            parts.append(
                f"The {name} chosen for {', '.join(edge)} is the smallest or largest that was "
                "tried: another may do better."
            )
        file = f"{number}-{name.replace('_', '-')}.svg"
        images[file] = plots.against(
            name, {label: row.candidates for label, row in names.items()}, chosen
        )
        parts.append(f"![Validation accuracy against {name}]({file})")
        parts.append(
            f"Validation accuracy against {name}: mean and 95 % interval; a ring is around what "
            "was chosen."
        )
    if all(result.curve for result in comparison.results):
        file = f"{number}-curves.svg"
        images[file] = plots.curves(chosen)
        parts.append(f"![Learning curves]({file})")
        parts.append("Learning curves of what was chosen: mean and 95 % band over seeds.")
    for label, row in names.items():
        for candidate in row.candidates:
            if candidate.diverged:
                parts.append(
                    f"{label} with {_values(candidate.values, row, all_of_them=True)}: "
                    f"{candidate.diverged} of {len(candidate.results)} runs diverged, so it could "
                    "not be chosen."
                )
    return "\n\n".join(parts)


def _in_short(rows: list[Row], baseline: str) -> str:
    best = rows[0]
    if best.test is None:
        return "All methods diverged."
    sentences = [f"Highest test accuracy: {label_of(best, rows)}, {100 * best.test.mean:.2f} %."]
    for number, name in enumerate((f"{baseline}, same epochs", f"{PLAIN}, same gradients")):
        made = [row for row in rows if row.p_values[number] is not None]
        if not made:
            continue
        differ = {True: [], False: []}
        for row in made:
            difference = (row.same_epochs, row.same_gradients)[number]
            p = row.p_values[number]
            assert difference is not None
            assert p is not None
            if p <= 1 - LEVEL:
                differ[difference.estimate.mean > 0].append(label_of(row, rows))
        said = [
            f"significantly {word}: {', '.join(differ[better])}"
            for better, word in ((True, "better"), (False, "worse"))
            if differ[better]
        ]
        told = "; ".join(said) or "no difference is significant"
        sentences.append(f"Against {name}: {told}.")
    seeds = max(len(row.best.results) for row in rows if row.best)
    family = sum(p is not None for row in rows for p in row.p_values)
    smallest = family * 2.0 ** (1 - seeds)
    if family and smallest > 1 - LEVEL:
        sentences.append(
            f"With {seeds} seeds and {family} comparisons no p-value can be below "
            f"{min(smallest, 1):.2g}: nothing could have been significant here."
        )
    return " ".join(sentences)


def _table(rows: list[Row]) -> str:
    lines = [
        "| method | chosen | seeds | epochs | gradients | ms a step | validation % | test % | "
        "same epochs | same gradients |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- | --- |",
    ]
    for row in rows:
        best = row.best or row.candidates[0]
        times = [result.milliseconds_per_step for result in best.results]
        at_once = " to ".join(map(str, sorted({r.runs_at_once for r in best.results})))
        lines.append(
            f"| {row.method} | {_values(row.best.values, row) if row.best else 'diverged'} | "
            f"{len(best.results)} | {row.epochs} | "
            f"{row.reported.gradients * row.reported.steps:,} | "
            f"{sum(times) / len(times):.3g} ({at_once}) | "
            f"{_estimate(row.best.validation) if row.best else ''} | "
            f"{_estimate(row.test) if row.test else ''} | "
            f"{_compared(row.same_epochs, row.p_values[0])} | "
            f"{_compared(row.same_gradients, row.p_values[1])} |"
        )
    return "\n".join(lines)


def _values(values: dict[str, float], row: Row, *, all_of_them: bool = False) -> str:
    """Those that were swept, and rho always."""
    shown = [
        f"{name} {value:g}"
        for name, value in values.items()
        if name in {"rho", *row.swept} or all_of_them
    ]
    return ", ".join(shown)


def _estimate(value: Estimate) -> str:
    if value.count < 2:
        return f"{100 * value.mean:.2f}"
    return (
        f"{100 * value.mean:.2f} ± {100 * value.standard_error:.2f} "
        f"[{100 * value.low:.2f}, {100 * value.high:.2f}]"
    )


def _compared(difference: Difference | None, p_value: float | None) -> str:
    if difference is None or p_value is None:
        return ""
    value = difference.estimate
    text = (
        f"{100 * value.mean:+.2f} [{100 * value.low:+.2f}, {100 * value.high:+.2f}], "
        f"p = {p_value:.3g}"
    )
    return f"**{text}**" if p_value <= 1 - LEVEL else text


_METHOD = f"""## How to read it

* *test %* is the mean over seeds, its standard error, and Student's 95 % interval. It is that of
  the hyperparameters with the best mean validation accuracy, and of each run's best epoch on the
  validation split; the test split was not looked at for either.
* *same epochs* and *same gradients* are mean differences in test accuracy, in points: to the
  baseline trained for as many epochs, and to plain training (sgd) with as many gradients of a
  batch, that is more epochs. Runs are paired by seed, which fixes initialisation, order of the
  examples, augmentation and wrong labels.
* *p* is of a paired permutation test, exact for up to {EXACT_SEEDS} seeds, two-sided, after Holm's
  correction for all comparisons of a table. **Bold** is significant at
  {100 * (1 - LEVEL):.0f} %. The intervals are not corrected.
* The hyperparameters are chosen by validation accuracies of the same runs whose test accuracies
  are compared. Runs that were lucky in both make the best of many values look a little better
  than it is, and p-values a little too small; sgd has one value here and no such luck. To
  confirm a difference, compare the chosen values alone from other seeds (--first-seed).
* The seeds do not vary the split: intervals and p-values are about this test split. Of several
  tables each is corrected for itself.
* *gradients* are those of a batch in a run; *ms a step* is a run's share of the time of those
  trained at once (how many), evaluation included but for runs of experiments.train.
* summary.csv has this table, runs.csv every run, curves.csv every epoch."""


def _origins(comparisons: Sequence[Comparison]) -> str:
    lines = ["## How it was made"]
    for about in (about for comparison in comparisons for about in comparison.origins):
        lines.append(f"```sh\n{about['command']}\n```")
        versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
        hardware = ", ".join(f"{name}: {value}" for name, value in about["hardware"].items())
        lines.append(f"{versions}. {hardware}.")
        if (runs := about.get("runs", 0)) > about.get("finished", runs):
            lines.append(f"Not complete: {about['finished']} of {runs} runs.")
        if about.get("speed"):
            lines.append(speed_in_words(about["speed"]))
    return "\n\n".join(lines)


def speed_in_words(speed: dict[str, float]) -> str:
    """How much training many runs at once gained."""
    together, training, steps = (speed[n] for n in ("together", "by_training", "steps_alone"))
    return (
        f"{speed['runs']:.0f} runs took {together:.0f} s, compilation included. One after another "
        f"they take {training:.0f} s with experiments.train, {training / together:.1f} times as "
        f"long (one of each method was timed); {steps:.0f} s of that are steps and evaluation."
    )


def _title(comparisons: Sequence[Comparison]) -> str:
    names = dict.fromkeys(comparison.task["dataset"] for comparison in comparisons)
    return f"Comparison on {', '.join(names)}"


def _page(text: str, images: dict[str, str]) -> str:
    """The same as HTML, with its images in it."""
    body = MarkdownIt("commonmark").enable("table").render(text)
    for name, image in images.items():
        data = base64.b64encode(image.encode()).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/svg+xml;base64,{data}"')
    title = html.escape(re.sub(r"^# ", "", text.splitlines()[0]))
    return _PAGE.format(title=title, body=body)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 90rem; margin: auto; padding: 1rem; }}
table {{ border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #bbb; padding: 0.3rem 0.6rem; white-space: nowrap; }}
tr:first-child td {{ background: #eee; }}
img {{ max-width: 100%; }}
pre {{ background: #eee; padding: 0.7rem; white-space: pre-wrap; }}
</style>
{body}</html>
"""


def _write_summary(path: Path, tables: Sequence[Table]) -> None:
    lines = []
    for comparison, _, rows in tables:
        for row in rows:
            best, test = row.best, row.test
            line = {
                "task": task_in_words(comparison.task),
                "method": row.method,
                "epochs": row.epochs,
                "chosen": _values(best.values, row) if best else "",
                "seeds": test.count if test else 0,
                "validation_accuracy": best.validation.mean if best else None,
                "test_accuracy": test.mean if test else None,
                "standard_error": test.standard_error if test else None,
                "low": test.low if test else None,
                "high": test.high if test else None,
            }
            for name, difference, p in zip(
                ("same_epochs", "same_gradients"),
                (row.same_epochs, row.same_gradients),
                row.p_values,
                strict=True,
            ):
                value = difference.estimate if difference else None
                line |= {
                    f"{name}_difference": value.mean if value else None,
                    f"{name}_low": value.low if value else None,
                    f"{name}_high": value.high if value else None,
                    f"{name}_p_value": p,
                }
            lines.append(line)
    files.write_csv(path, list(lines[0]), lines)
