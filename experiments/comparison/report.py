"""The report of a comparison, as Markdown and as one HTML page with its plots inside."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

from experiments.comparison import plots
from experiments.comparison.how_to_read import HOW_TO_READ
from experiments.comparison.results import Comparison
from experiments.comparison.significance import Difference, Estimate
from experiments.comparison.table import DIFFERENCES, Row, baseline_of, row_name, rows_of
from experiments.comparison.verdict import compared, in_short
from experiments.comparison.words import computed_with, duration, shell, task_in_words
from experiments.config.methods import PLAIN
from experiments.system import files


class Section(NamedTuple):
    """A comparison, the label of its baseline, and the rows of its table."""

    comparison: Comparison
    baseline: str
    rows: list[Row]


def sections_of(comparisons: Sequence[Comparison], baseline: str | None) -> list[Section]:
    """Returns one section per comparison. See :func:`rows_of` for the baseline."""
    return [
        Section(comparison, baseline or baseline_of(comparison), rows_of(comparison, baseline))
        for comparison in comparisons
    ]


def write_report(folder: Path, sections: Sequence[Section]) -> None:
    """Writes report.md, report.html, summary.csv and the plots.

    Args:
        folder: an existing folder.
        sections: one per task.
    """
    comparisons = [section.comparison for section in sections]
    images: dict[str, str] = {}
    parts = [_section(known, number, images, folder) for number, known in enumerate(sections, 1)]
    text = (
        "\n\n".join(["# " + _title(comparisons), *parts, HOW_TO_READ, _origins(comparisons)]) + "\n"
    )
    write_pages(folder, text, images)
    _write_summary(folder / "summary.csv", sections)


def _section(section: Section, number: int, images: dict[str, str], folder: Path) -> str:
    comparison, baseline, rows = section
    names = {row_name(row, rows): row for row in rows}
    chosen = {label: row.chosen for label, row in names.items()}
    best = {label: row.best for label, row in names.items()}
    parts = [f"## {task_in_words(comparison.task)}", in_short(rows, baseline)]
    if any(row.test for row in rows):
        file = f"{number}-accuracy.svg"
        images[file] = plots.accuracies(names)
        parts.append(f"![Test accuracy of each method, and what it cost]({file})")
        parts.append(
            "Bars: test accuracy of the best epoch, with 95 % intervals; dotted: of the last epoch."
        )
    parts.append(_table(rows, baseline))
    parts += _seeds(comparison)
    parts.append(
        "**better** and *worse* are significant; the differences are in points of test accuracy."
    )
    swept = sorted({name for row in rows if row.chosen for name in row.swept})
    for name in swept:
        if edge := [label for label, row in names.items() if row.at_the_edge(name)]:
            parts.append(
                f"The {name} chosen for {', '.join(edge)} is the smallest or largest value "
                "tried: another value may do better."
            )
        file = f"{number}-{name.replace('_', '-')}.svg"
        images[file] = plots.against(
            name, {label: row.candidates for label, row in names.items()}, chosen
        )
        parts.append(f"![Validation accuracy against {name}]({file})")
        parts.append(
            f"Validation accuracy against {name}: mean and 95 % interval. A ring marks the chosen "
            "value."
        )
    file = f"{number}-curves.svg"
    shown = [result for known in best.values() if known for result in known.results]
    if shown and all(result.curve for result in shown):
        images[file] = plots.curves(best)
    elif (folder / file).exists():  # curves.csv was not kept
        images[file] = (folder / file).read_text()
    if file in images:
        parts.append(f"![Learning curves]({file})")
        parts.append("Learning curves with the chosen values: mean and 95 % band over seeds.")
    parts += ["### The numbers", _numbers(rows)]
    for label, row in names.items():
        if row.lost:
            parts.append(f"{label}: {row.lost} of the runs that confirm diverged.")
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


def _table(rows: list[Row], baseline: str) -> str:
    """Returns the table in words. :func:`_numbers` has what is behind them."""
    lines = [
        f"| method | chosen | test %, best epoch | last epoch | against {baseline} | "
        f"against {PLAIN}, same gradients | gradients | time |",
        "| --- | --- | ---: | ---: | --- | --- | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row_name(row, rows)} | {_chosen(row)} | {_mean(row.test)} | "
            f"{_mean(row.last_test)} | {compared(row.same_epochs)} | "
            f"{compared(row.same_gradients)} | {row.batch_gradients:,} | "
            f"{duration(row.seconds)} |"
        )
    return "\n".join(lines)


def _numbers(rows: list[Row]) -> str:
    lines = [
        "| method | seeds | ms per step | validation % | test % | same epochs | same gradients |",
        "| --- | ---: | ---: | --- | --- | --- | --- |",
    ]
    for row in rows:
        best = row.best or row.candidates[0]
        times = [result.milliseconds_per_step for result in best.results]
        at_once = " to ".join(map(str, sorted({r.runs_at_once for r in best.results})))
        lines.append(
            f"| {row_name(row, rows)} | {len(best.results)} | "
            f"{sum(times) / len(times):.3g} ({at_once}) | "
            f"{_estimate(row.best.validation) if row.best else ''} | "
            f"{_estimate(row.test) if row.test else ''} | "
            f"{_difference(row.same_epochs, len(best.results))} | "
            f"{_difference(row.same_gradients, len(best.results))} |"
        )
    return "\n".join(lines)


def _seeds(comparison: Comparison) -> list[str]:
    """Says which seeds chose the values and which are reported, if these are others."""
    confirming = sorted({result.seed for result in comparison.results if result.confirms})
    choosing = sorted({result.seed for result in comparison.results if not result.confirms})
    if not confirming:
        return []
    return [
        f"The values were chosen with the seeds {_listed(choosing)}. Everything above is about the "
        f"fresh seeds {_listed(confirming)}, which chose nothing."
    ]


def _listed(seeds: Sequence[int]) -> str:
    whole = len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))


def _chosen(row: Row) -> str:
    if row.chosen is None:
        return "diverged"
    return _values(row.chosen.values, row) if row.best else "not confirmed"


def _mean(value: Estimate | None) -> str:
    return f"{100 * value.mean:.2f}" if value else ""


def _values(values: dict[str, float], row: Row, *, all_of_them: bool = False) -> str:
    """Returns the swept values, and rho always."""
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


def _difference(difference: Difference | None, seeds: int) -> str:
    if difference is None:
        return ""
    value = difference.estimate
    fewer = f" ({value.count} seeds)" if value.count != seeds else ""
    text = (
        f"{100 * value.mean:+.2f} [{100 * value.low:+.2f}, {100 * value.high:+.2f}], "
        f"p = {difference.p_value:.3g}{fewer}"
    )
    return f"**{text}**" if difference.sign else text


def _origins(comparisons: Sequence[Comparison]) -> str:
    lines = ["## How it was made"]
    for about in (about for comparison in comparisons for about in comparison.origins):
        lines.append(shell([about["command"]]))
        lines.append(computed_with(about))
        for later in about.get("continued", []):
            lines.append(f"Continued with: {computed_with(later)}")
        if (runs := about.get("runs", 0)) > about.get("finished", runs):
            lines.append(f"Not complete: {about['finished']} of {runs} runs.")
    return "\n\n".join(lines)


def _title(comparisons: Sequence[Comparison]) -> str:
    names = dict.fromkeys(comparison.task["dataset"] for comparison in comparisons)
    return f"Comparison on {', '.join(names)}"


_SUMMARY = ["task", "method", "epochs", "chosen", "seeds", "validation_accuracy", "test_accuracy"]
_SUMMARY += ["standard_error", "low", "high"]
_PARTS = ("difference", "low", "high", "p_value", "seeds")
_SUMMARY += [f"{name}_{part}" for name in DIFFERENCES for part in _PARTS]


def _write_summary(path: Path, sections: Sequence[Section]) -> None:
    lines = []
    for comparison, _, rows in sections:
        for row in rows:
            line = {"task": task_in_words(comparison.task), "method": row.method, "seeds": 0}
            line["epochs"] = row.epochs
            if row.best and row.test:
                line |= {"chosen": _values(row.best.values, row), "seeds": row.test.count}
                line["validation_accuracy"] = row.best.validation.mean
                names = ("test_accuracy", "standard_error", "low", "high")
                line |= dict(zip(names, row.test, strict=False))
            for name in DIFFERENCES:
                if difference := getattr(row, name):
                    mean, _, low, high, count = difference.estimate
                    parts = zip(_PARTS, (mean, low, high, difference.p_value, count), strict=True)
                    line |= {f"{name}_{part}": value for part, value in parts}
            lines.append(line)
    files.write_csv(path, _SUMMARY, lines)


def write_pages(folder: Path, text: str, images: Mapping[str, str]) -> None:
    """Writes report.md, report.html and the images, which are SVG by file name."""
    for name, image in images.items():
        files.write_text(folder / name, image)
    files.write_text(folder / "report.md", text)
    files.write_text(folder / "report.html", html_page(text, images))


def html_page(text: str, images: Mapping[str, str]) -> str:
    """Returns Markdown as an HTML page with its images inside. `images` are SVG by file name.

    Names of data sets, models and folders are in the text, and could be anything: HTML in it is
    shown as text, and only these images are links.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.validateLink = lambda url: url in images  # type: ignore[method-assign]
    body = markdown.render(text)
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
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 1rem; }}
table {{ border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #bbb; padding: 0.3rem 0.6rem; }}
tr:first-child td {{ background: #eee; }}
img {{ max-width: 100%; }}
pre {{ background: #eee; padding: 0.7rem; white-space: pre-wrap; }}
</style>
{body}</html>
"""
