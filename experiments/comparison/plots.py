"""The plots of a comparison, readable in black and white and at a small size."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np

from experiments.comparison.drawing import SETTINGS, draw_estimates, scaled, styles_of, svg_of
from experiments.comparison.significance import Candidate, Estimate, estimate
from experiments.comparison.table import Row

_SIZE = (7.0, 3.6)


def accuracies(rows: Mapping[str, Row]) -> str:
    """Draws test accuracies, alone and against what a run costs, as SVG.

    Args:
        rows: rows of a table by name, the best first; those that diverged are left out.
    """
    known = {name: row for name, row in rows.items() if row.test}
    styles = styles_of(known)
    with matplotlib.rc_context(SETTINGS):
        figure = matplotlib.figure.Figure(
            figsize=(12, 1.4 + 0.35 * len(known)), layout="constrained"
        )
        bars, gradients, seconds = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
        _bars(bars, known, styles)
        for axes, costs, label in (
            (gradients, {n: row.batch_gradients for n, row in known.items()}, "gradients of a run"),
            (seconds, {n: row.seconds for n, row in known.items()}, "seconds of a run"),
        ):
            for name, row in known.items():
                colour, marker, _ = styles[name]
                mean, error = scaled(row.test)
                axes.errorbar(costs[name], mean, yerr=error, fmt=marker, color=colour, capsize=3)
            axes.set(xlabel=label, ylabel="test accuracy (%)", xlim=(0, None))
        return svg_of(figure)


def over_label_noise(lines: Mapping[str, Mapping[float, Estimate]]) -> str:
    """Draws test accuracy against the share of wrong labels, as SVG.

    Args:
        lines: by name, estimates by share of wrong labels.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = matplotlib.figure.Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for place, (name, style) in enumerate(styles_of(lines).items()):
            # A little aside, so that intervals do not hide each other.
            aside = 0.5 * (place - len(lines) / 2)
            shares = [100 * share + aside for share in lines[name]]
            draw_estimates(axes, name, shares, lines[name].values(), style)
        axes.set(xlabel="wrong training labels (%)", ylabel="test accuracy (%)")
        axes.legend(fontsize=9)
        return svg_of(figure)


def _bars(axes: Any, known: Mapping[str, Row], styles: Mapping[str, Any]) -> None:
    """Draws a bar for each row, the best on top. A line across it is the last epoch."""
    ends = [100 * end for row in known.values() if row.test for end in _ends(row)]
    cut = min(ends) > 50 and max(ends) - min(ends) < 25
    low = max(0, min(ends) - 0.5 * (max(ends) - min(ends)) - 0.5) if cut else 0
    for place, (name, row) in enumerate(known.items()):
        colour, marker, _ = styles[name]
        mean, error = scaled(row.test)
        axes.barh(place, mean, xerr=error, color=colour, alpha=0.75, capsize=3)
        # The same marker as in the other plots.
        axes.plot(low + 0.03 * (max(ends) - low), place, marker, color="white")
        if row.last_test:
            last = 100 * row.last_test.mean
            axes.plot([last, last], [place - 0.4, place + 0.4], color="white", linewidth=3)
            axes.plot([last, last], [place - 0.4, place + 0.4], ":", color="black")
    axes.set_yticks(range(len(known)), known)
    axes.invert_yaxis()
    axes.set(xlim=(low, None), xlabel=f"test accuracy (%){', axis cut' if low else ''}")


def _ends(row: Row) -> list[float]:
    assert row.test
    known = [row.test.low, row.test.high, row.test.mean]
    known += [row.last_test.mean] if row.last_test else []
    return [value for value in known if np.isfinite(value)]


def against(
    name: str, methods: Mapping[str, Sequence[Candidate]], chosen: Mapping[str, Candidate | None]
) -> str:
    """Draws validation accuracy against a hyperparameter, as SVG.

    Args:
        name: a hyperparameter of some methods. The other methods are horizontal lines.
        methods: candidates of each method.
        chosen: the chosen candidate of each method; a ring marks it.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = matplotlib.figure.Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        values = {c.values[name] for known in methods.values() for c in known if name in c.values}
        if min(values) > 0:
            axes.set_xscale("log")
            axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
            axes.minorticks_off()
        for number, (label, style) in enumerate(styles_of(methods).items()):
            best = chosen[label]
            if best is None:
                continue
            if name not in best.values:
                _level(axes, label, best.validation, style)
                continue
            # The other hyperparameters have their chosen values.
            rest = {key: value for key, value in best.values.items() if key != name}
            line = [
                c
                for c in methods[label]
                if not c.diverged and name in c.values and rest.items() <= c.values.items()
            ]
            # A small shift, so that intervals do not hide each other.
            aside = 1 + 0.02 * (number - len(methods) / 2) if min(values) > 0 else 1.0
            _line(axes, label, name, line, best, aside, style)
        axes.set(xlabel=name, ylabel="validation accuracy (%)")
        axes.legend(fontsize=8, ncols=2)
        return svg_of(figure)


def curves(chosen: Mapping[str, Candidate | None]) -> str:
    """Draws training loss and validation accuracy of the chosen candidates by epoch, as SVG."""
    with matplotlib.rc_context(SETTINGS):
        figure = matplotlib.figure.Figure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for label, style in styles_of(chosen).items():
            best = chosen[label]
            if best is None:
                continue
            for axes, column, scale in ((left, "loss", 1.0), (right, "validation_accuracy", 100.0)):
                _course(axes, label, best, column, scale, style)
        left.set(xlabel="epoch", ylabel="training loss")
        right.set(xlabel="epoch", ylabel="validation accuracy (%)")
        right.legend(fontsize=9)
        return svg_of(figure)


def _line(
    axes: Any,
    label: str,
    name: str,
    line: Sequence[Candidate],
    best: Candidate,
    aside: float,
    style: Any,
) -> None:
    colour, *_ = style
    places = [aside * candidate.values[name] for candidate in line]
    draw_estimates(axes, label, places, [candidate.validation for candidate in line], style)
    axes.plot(
        aside * best.values[name],
        100 * best.validation.mean,
        "o",
        markersize=14,
        markerfacecolor="none",
        markeredgecolor=colour,
    )


def _level(axes: Any, label: str, value: Estimate, style: Any) -> None:
    colour, _, dash = style
    axes.axhline(100 * value.mean, label=label, color=colour, linestyle=dash)
    axes.axhspan(100 * value.low, 100 * value.high, color=colour, alpha=0.1, linewidth=0)


def _course(axes: Any, label: str, best: Candidate, column: str, scale: float, style: Any) -> None:
    colour, marker, dash = style
    rows = [[row[column] for row in result.curve] for result in best.results]
    points = scale * np.asarray([estimate(values)[:4] for values in np.asarray(rows).T.tolist()])
    epochs = np.arange(1, len(points) + 1)
    mean, _, low, high = points.T
    axes.plot(
        epochs,
        mean,
        label=label,
        color=colour,
        linestyle=dash,
        marker=marker,
        markevery=max(1, len(points) // 6),
        markersize=5,
    )
    axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
