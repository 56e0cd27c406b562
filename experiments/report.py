"""The report of a comparison."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import files, page, plots
from experiments.config import Config
from experiments.methods import PLAIN
from experiments.results import Comparison
from experiments.significance import EXACT_SEEDS, LEVEL, Difference, Estimate
from experiments.table import Row, baseline_of, label_of, rows_of


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
    parts = [_section(table, number, images, folder) for number, table in enumerate(tables, 1)]
    text = "\n\n".join(["# " + _title(comparisons), *parts, _METHOD, _origins(comparisons)]) + "\n"
    for name, image in images.items():
        files.write(folder / name, image)
    files.write(folder / "report.md", text)
    files.write(folder / "report.html", page.of(text, images))
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


def _section(table: Table, number: int, images: dict[str, str], folder: Path) -> str:
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
    file = f"{number}-curves.svg"
    if all(result.curve for best in chosen.values() if best for result in best.results):
        images[file] = plots.curves(chosen)
    elif (folder / file).exists():  # of results whose curves.csv was not kept
        images[file] = (folder / file).read_text()
    if file in images:
        parts.append(f"![Learning curves]({file})")
        parts.append("Learning curves of what was chosen: mean and 95 % band over seeds.")
    for label, row in names.items():
        seeds = max(len(candidate.results) for candidate in row.candidates)
        for candidate in row.candidates:
            runs = len(candidate.results)
            reasons = [
                f"{candidate.diverged} of {runs} runs diverged" if candidate.diverged else "",
                f"there are {runs} of {seeds} runs" if runs < seeds else "",
            ]
            if any(reasons):
                parts.append(
                    f"{label} with {_values(candidate.values, row, all_of_them=True)}: "
                    f"{' and '.join(filter(None, reasons))}, so it could not be chosen."
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
    differences = [d for row in rows for d in (row.same_epochs, row.same_gradients) if d]
    family = len(differences)
    seeds = max((d.estimate.count for d in differences), default=0)
    smallest = family * 2.0 ** (1 - seeds)
    if differences and smallest > 1 - LEVEL:
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
            f"{round(row.reported.gradients * row.reported.steps):,} | "
            f"{sum(times) / len(times):.3g} ({at_once}) | "
            f"{_estimate(row.best.validation) if row.best else ''} | "
            f"{_estimate(row.test) if row.test else ''} | "
            f"{_compared(row.same_epochs, row.p_values[0], len(best.results))} | "
            f"{_compared(row.same_gradients, row.p_values[1], len(best.results))} |"
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


def _compared(difference: Difference | None, p_value: float | None, seeds: int) -> str:
    if difference is None or p_value is None:
        return ""
    value = difference.estimate
    fewer = f" ({value.count} seeds)" if value.count != seeds else ""
    text = (
        f"{100 * value.mean:+.2f} [{100 * value.low:+.2f}, {100 * value.high:+.2f}], "
        f"p = {p_value:.3g}{fewer}"
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
  than it is, and p-values a little too small; a method with one value has no such luck. To
  confirm a difference, compare the chosen values alone from other seeds (--first-seed).
* The seeds do not vary the split: intervals and p-values are about this test split. Of several
  tables each is corrected for itself.
* *gradients* are those of a batch in a run; *ms a step* is a run's share of the time of those
  trained at once (how many), evaluation included but for runs of experiments.train.
* summary.csv has this table, runs.csv every run, curves.csv every epoch (of several tasks, in a
  folder for each)."""


def _origins(comparisons: Sequence[Comparison]) -> str:
    lines = ["## How it was made"]
    for about in (about for comparison in comparisons for about in comparison.origins):
        lines.append(f"```sh\n{about['command']}\n```")
        lines.append(_computed_with(about))
        for later in about.get("continued", []):
            lines.append(f"Continued with: {_computed_with(later)}")
        if (runs := about.get("runs", 0)) > about.get("finished", runs):
            lines.append(f"Not complete: {about['finished']} of {runs} runs.")
        if about.get("speed"):
            lines.append(speed_in_words(about["speed"]))
    return "\n\n".join(lines)


def _computed_with(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    hardware = ", ".join(f"{name}: {value}" for name, value in about["hardware"].items())
    return f"{versions}. {hardware}."


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
                    f"{name}_seeds": value.count if value else None,
                }
            lines.append(line)
    files.write_csv(path, list(lines[0]), lines)
