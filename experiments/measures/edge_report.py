"""The report of the curvature along full-batch training, as Markdown and as one HTML page."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.comparison import drawing
from experiments.comparison.report import write_pages
from experiments.comparison.significance import Estimate, estimate, estimates_of
from experiments.comparison.words import computed_with, shell, table
from experiments.measures.edge import Curvature, Setting
from experiments.system import files

_PLOT, _LOSSES = "1-curvature.svg", "2-loss.svg"


def write_edge_report(
    folder: Path, measured: Sequence[Curvature], setting: Setting, about: dict[str, Any]
) -> None:
    """Writes edge.csv, report.md, report.html and the plots.

    Args:
        folder: an existing folder.
        measured: see :func:`experiments.measures.edge.curvature_along`.
        setting: how the networks were trained.
        about: command, versions, hardware, name of the data set and number of examples.
    """
    files.write_csv(folder / "edge.csv", Curvature._fields, (m._asdict() for m in measured))
    methods = list(dict.fromkeys(m.method for m in measured))
    flat = 2 / setting.learning_rate
    panels = {
        method: {
            "largest eigenvalue": _course(measured, method, lambda m: m.eigenvalue),
            "SAM's edge": _course(measured, method, lambda m: m.sams_edge),
            "2 / step size": _course(measured, method, lambda m: flat),
        }
        for method in methods
    }
    losses = {method: _course(measured, method, lambda m: m.loss) for method in methods}
    images = {
        _PLOT: drawing.panels(panels, "step", "curvature", yscale="log"),
        _LOSSES: drawing.panels({"": losses}, "step", "training loss", yscale="log"),
    }
    text = "\n\n".join(
        [
            f"# The edge of stability on {about['dataset']}",
            f"{about['examples']:,} examples in every step, {setting.loss} loss, step size "
            f"{setting.learning_rate:g}, rho {setting.rho:g}, a perceptron with tanh units, "
            f"{' '.join(map(str, setting.widths))}.",
            f"![Largest eigenvalue of the Hessian, and the two edges]({_PLOT})",
            f"![Training loss]({_LOSSES})",
            "Mean and 95 % band over seeds.",
            _table(measured, methods, setting),
            _METHOD,
            shell([about["command"]]),
            computed_with(about),
        ]
    )
    write_pages(folder, text + "\n", images)


def late(
    measured: Sequence[Curvature], method: str, value: Callable[[Curvature], float]
) -> Estimate:
    """Returns a value over seeds, for each its median over the second half of the training."""
    last = max(m.step for m in measured)
    by_seed: dict[int, list[float]] = {}
    for m in measured:
        if m.method == method and m.step > last / 2:
            by_seed.setdefault(m.seed, []).append(value(m))
    return estimate([statistics.median(values) for values in by_seed.values()])


def _course(
    measured: Sequence[Curvature], method: str, value: Callable[[Curvature], float]
) -> dict[float, Estimate]:
    return estimates_of((method, m.step, value(m)) for m in measured if m.method == method)[method]


def _table(measured: Sequence[Curvature], methods: Sequence[str], setting: Setting) -> str:
    columns: list[tuple[str, Callable[[Curvature], float]]] = [
        ("eigenvalue / SAM's edge", lambda m: m.eigenvalue / m.sams_edge),
        ("eigenvalue / (2 / step size)", lambda m: m.eigenvalue * setting.learning_rate / 2),
        ("eigenvalue", lambda m: m.eigenvalue),
        ("norm of the gradient", lambda m: m.gradient),
        ("loss", lambda m: m.loss),
        ("error (%)", lambda m: 100 * m.error),
    ]
    rows = [["method", "seeds", *(name for name, _ in columns)]]
    rows.append(["---", *["---:"] * (len(columns) + 1)])
    for method in methods:
        values = [late(measured, method, value) for _, value in columns]
        rows.append([method, str(values[0].count), *map(_cell, values)])
    return table(rows)


def _cell(value: Estimate) -> str:
    half = f" ± {value.high - value.mean:.2g}" if value.count > 1 else ""
    return f"{value.mean:.4g}{half}"


_METHOD = (
    "Medians over the second half of the training, and the 95 % interval over seeds. A ratio near "
    "1 means that the curvature settles at that edge. For gradient descent (gd), SAM's edge is the "
    "edge of stability. The formula of SAM's edge is for SAM: the methods that ascend BiSAM's "
    "losses are measured against the same one, with the gradient of the training loss."
)
