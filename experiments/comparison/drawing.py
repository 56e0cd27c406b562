"""Lines of estimates and contours, readable in black and white and at a small size."""

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np

from experiments.comparison.significance import Estimate

# Colors differ in lightness, and each has its own marker and dash.
_COLOURS = ("#000000", "#d55e00", "#0072b2", "#e69f00", "#56b4e9", "#009e73", "#cc79a7")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)))
_MOST_MARKERS = 12
# A fixed salt: the same numbers give the same file.
SETTINGS: Any = {
    "svg.hashsalt": "bisam_jax",
    "font.size": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def panels(
    lines: Mapping[str, Mapping[str, Mapping[float, Estimate]]],
    xlabel: str,
    ylabel: str,
    *,
    xscale: str = "linear",
    yscale: str = "linear",
    percent: bool = False,
    floor: float | None = None,
) -> str:
    """Draws one plot per panel, as SVG.

    Args:
        lines: by title of the panel, name of the line and place.
        xlabel: label of the places.
        ylabel: label of the estimates.
        xscale: "linear" or "log".
        yscale: "linear", "log" or "symlog".
        percent: whether the estimates are shares, to be drawn in percent.
        floor: lowest value drawn.
    """
    with matplotlib.rc_context(SETTINGS):
        columns = min(3, len(lines))
        rows = -(-len(lines) // columns)
        width = 7 if len(lines) == 1 else 4 * columns
        figure = matplotlib.figure.Figure(figsize=(width, 3.4 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.ravel()[len(lines) :]:
            axes.set_axis_off()
        styles = styles_of({name: None for panel in lines.values() for name in panel})
        for axes, (title, panel) in zip(grid.ravel(), lines.items(), strict=False):
            for name, line in panel.items():
                draw = draw_estimates if len(line) <= _MOST_MARKERS else _band
                draw(axes, name, list(line), line.values(), styles[name], 100 if percent else 1)
            axes.set(xscale=xscale, xlabel=xlabel, yscale=yscale, ylabel=ylabel, title=title)
            places = sorted({place for line in panel.values() for place in line})
            if xscale == "log" and len(places) <= _MOST_MARKERS:
                axes.set_xticks(places, [f"{place:g}" for place in places])
                axes.minorticks_off()
            if floor is not None:
                axes.set_ylim(bottom=floor)
        grid[0, 0].legend(fontsize=7)
        return svg_of(figure)


def contours(planes: Mapping[str, Any], places: Any, xlabel: str, ylabel: str) -> str:
    """Draws one contour plot per plane, all with the same levels, as SVG.

    Args:
        planes: float[points, points] by title; the first axis is drawn from left to right.
        places: float[points].
        xlabel: label of the first axis.
        ylabel: label of the second axis.
    """
    with matplotlib.rc_context(SETTINGS):
        columns = min(3, len(planes))
        rows = -(-len(planes) // columns)
        figure = matplotlib.figure.Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        low = max(1e-4, min(float(np.min(plane)) for plane in planes.values()))
        high = max(float(np.max(plane)) for plane in planes.values())
        levels = np.geomspace(low, max(high, 2 * low), 13)
        for axes in grid.ravel()[len(planes) :]:
            axes.set_axis_off()
        for axes, (title, plane) in zip(grid.ravel(), planes.items(), strict=False):
            drawn = axes.contour(places, places, np.transpose(plane), levels, cmap="viridis")
            axes.clabel(drawn, fontsize=6, fmt="%.2g")
            axes.plot(0, 0, "k+")
            axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        return svg_of(figure)


def styles_of(labels: Iterable[str]) -> dict[str, Any]:
    """Returns the style of each label. It is the same in all plots of the same labels."""
    # The three counts have no common factor, so many labels have distinct styles.
    styles = zip(*map(itertools.cycle, (_COLOURS, _MARKERS, _DASHES)), strict=True)
    return dict(zip(sorted(labels), styles, strict=False))


def scaled(value: Estimate | None, scale: float = 100) -> tuple[float, Any]:
    """Returns the mean and the two lengths of its 95 % interval; 0 where there is none."""
    assert value
    lengths = np.nan_to_num([[value.mean - value.low], [value.high - value.mean]])
    return scale * value.mean, (scale * lengths).tolist()


def draw_estimates(
    axes: Any,
    label: str,
    places: Sequence[float],
    values: Iterable[Estimate],
    style: Any,
    scale: float = 100,
) -> None:
    """Draws a line of means with their intervals."""
    colour, marker, dash = style
    points = [scaled(value, scale) for value in values]
    axes.errorbar(
        places,
        [mean for mean, _ in points],
        yerr=np.concatenate([error for _, error in points], axis=1),
        label=label,
        color=colour,
        marker=marker,
        linestyle=dash,
        capsize=3,
    )


def _band(
    axes: Any,
    label: str,
    places: Sequence[float],
    values: Iterable[Estimate],
    style: Any,
    scale: float,
) -> None:
    """Draws a line of many means with a band of their intervals."""
    colour, _, dash = style
    points = scale * np.asarray([value[:4] for value in values])
    mean, _, low, high = points.T
    axes.plot(places, mean, label=label, color=colour, linestyle=dash)
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def svg_of(figure: matplotlib.figure.Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
