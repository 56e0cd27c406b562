"""The plots of a comparison, readable in black and white and at a small size."""

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np

from experiments.comparison.significance import Candidate, Estimate, estimate

# Colors differ in lightness, and each has its own marker and dash.
_COLOURS = ("#000000", "#d55e00", "#0072b2", "#e69f00", "#56b4e9", "#009e73", "#cc79a7")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)))
_SIZE = (7.0, 3.6)
# A fixed salt: the same numbers give the same file.
_SETTINGS: Any = {
    "svg.hashsalt": "bisam_jax",
    "font.size": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def against(
    name: str, methods: Mapping[str, Sequence[Candidate]], chosen: Mapping[str, Candidate | None]
) -> str:
    """Draws validation accuracy against a hyperparameter, as SVG.

    Args:
        name: a hyperparameter of some methods. The other methods are horizontal lines.
        methods: candidates of each method.
        chosen: the reported candidate of each method; a ring marks it.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure = matplotlib.figure.Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        values = {c.values[name] for known in methods.values() for c in known if name in c.values}
        if min(values) > 0:
            axes.set_xscale("log")
            axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
            axes.minorticks_off()
        for number, (label, style) in enumerate(_styles(methods).items()):
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
        return _svg(figure)


def curves(chosen: Mapping[str, Candidate | None]) -> str:
    """Draws training loss and validation accuracy of the chosen candidates by epoch, as SVG."""
    with matplotlib.rc_context(_SETTINGS):
        figure = matplotlib.figure.Figure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for label, style in _styles(chosen).items():
            best = chosen[label]
            if best is None:
                continue
            for axes, column, scale in ((left, "loss", 1.0), (right, "validation_accuracy", 100.0)):
                _course(axes, label, best, column, scale, style)
        left.set(xlabel="epoch", ylabel="training loss")
        right.set(xlabel="epoch", ylabel="validation accuracy (%)")
        right.legend(fontsize=9)
        return _svg(figure)


def _styles(labels: Iterable[str]) -> dict[str, Any]:
    """Returns the style of each label. It is the same in all plots of the same labels."""
    # The three counts have no common factor, so many labels have distinct styles.
    styles = zip(*map(itertools.cycle, (_COLOURS, _MARKERS, _DASHES)), strict=True)
    return dict(zip(sorted(labels), styles, strict=False))


def _line(
    axes: Any,
    label: str,
    name: str,
    line: Sequence[Candidate],
    best: Candidate,
    aside: float,
    style: Any,
) -> None:
    colour, marker, dash = style
    means = 100 * np.asarray([candidate.validation[:4] for candidate in line])
    axes.errorbar(
        [aside * candidate.values[name] for candidate in line],
        means[:, 0],
        yerr=np.nan_to_num([means[:, 0] - means[:, 2], means[:, 3] - means[:, 0]]),
        label=label,
        color=colour,
        marker=marker,
        linestyle=dash,
        capsize=3,
    )
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


def _svg(figure: matplotlib.figure.Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
