"""The report of sharpness and curvature, as Markdown and as one HTML page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.comparison import drawing
from experiments.comparison.report import write_pages
from experiments.comparison.significance import Estimate, estimate, estimates_of
from experiments.comparison.words import computed_with, shell, table, task_in_words
from experiments.measures.findings import Finding, Measures
from experiments.measures.sharpness import (
    ADAPTIVE_BALL,
    ONE_STEP,
    PLAIN_BALL,
    RANDOM,
    WORST,
)
from experiments.measures.slices import Slices
from experiments.system import files

# Estimates by network and place; the place of a single number is None.
Lines = dict[str, dict[Any, Estimate]]


def write_sharpness_report(
    folder: Path,
    numbers: Sequence[Finding],
    slices: Mapping[str, Slices],
    measures: Measures,
    task: dict[str, Any],
    about: dict[str, Any],
) -> None:
    """Writes sharpness.csv, slices.csv, report.md, report.html and the plots.

    Args:
        folder: an existing folder.
        numbers: see :func:`experiments.measures.sharpness.measured_sharpness`.
        slices: by name of the networks.
        measures: what was measured.
        task: what all networks have in common.
        about: command, versions, hardware and number of examples.
    """
    files.write_csv(folder / "sharpness.csv", Finding._fields, (n._asdict() for n in numbers))
    files.write_csv(folder / "slices.csv", _SLICE_COLUMNS, _slice_rows(slices))
    images = _images(numbers, slices)
    parts = [f"# Sharpness on {task['dataset']}", f"{task_in_words(task)}."]
    parts += [f"![{_ALT[name]}]({name})\n\n{_ALT[name]}." for name in images]
    parts += ["## The numbers", _table(numbers, measures), _method(measures, about)]
    parts += [shell([about["command"]]), computed_with(about)]
    text = "\n\n".join(parts) + "\n"
    write_pages(folder, text, images)


def lines_of(numbers: Iterable[Finding], quantity: str, ball: str = "") -> Lines:
    """Returns the estimates over seeds of a quantity, by network and place."""
    return estimates_of(
        (n.network, None if math.isnan(n.at) else n.at, n.value)
        for n in numbers
        if (n.quantity, n.ball) == (quantity, ball)
    )


_ALT = {
    "1-l2.svg": "Rise of the loss in an l2 ball of radius rho",
    "2-adaptive.svg": "Rise of the loss in an adaptive l2 ball of radius rho",
    "3-error.svg": "Rise of the error at the worst point of both balls",
    "4-spectrum.svg": "Density of the eigenvalues of the Hessian",
    "5-slices.svg": "The loss along the filter-normalized directions of ascent and at random",
    "6-planes.svg": "The loss of the first seed in the plane of both directions",
}


def _images(numbers: Sequence[Finding], slices: Mapping[str, Slices]) -> dict[str, str]:
    def in_ball(ball: str) -> str:
        found = {
            what: lines_of(numbers, f"rise of the loss, {what}", ball)
            for what in (ONE_STEP, WORST, RANDOM)
        }
        return drawing.panels(found, "rho", "rise of the loss", xscale="log")

    errors = {
        f"{ball} ball": lines_of(numbers, f"rise of the error, {WORST}", ball)
        for ball in (PLAIN_BALL, ADAPTIVE_BALL)
    }
    along: dict[str, Lines] = {"ascent": {}, "random": {}}
    for network, known in slices.items():
        for name, line in along.items():
            columns = getattr(known, name).T.tolist()
            line[network] = dict(zip(known.places.tolist(), map(estimate, columns), strict=True))
    places = next(iter(slices.values())).places
    made = (
        in_ball(PLAIN_BALL),
        in_ball(ADAPTIVE_BALL),
        drawing.panels(errors, "rho", "rise of the error (points)", xscale="log", percent=True),
        drawing.panels(
            {"": lines_of(numbers, "density")}, "eigenvalue", "density", yscale="log", floor=1e-6
        ),
        drawing.panels(along, "step", "loss", yscale="log"),
        drawing.contours({n: s.plane for n, s in slices.items()}, places, "ascent", "random"),
    )
    return dict(zip(_ALT, made, strict=True))


def _table(numbers: Sequence[Finding], measures: Measures) -> str:
    """Returns one row per network. Radii are the middle ones."""
    plain, adaptive = (
        radii[len(radii) // 2] for radii in (measures.radii, measures.adaptive_radii)
    )
    columns: list[tuple[str, Lines, float | None, float]] = [
        ("test error (%)", lines_of(numbers, "test error"), None, 100),
        ("error (%)", lines_of(numbers, "error"), None, 100),
        ("loss", lines_of(numbers, "loss"), None, 1),
    ]
    for ball, rho in ((PLAIN_BALL, plain), (ADAPTIVE_BALL, adaptive)):
        for what in (ONE_STEP, WORST):
            lines = lines_of(numbers, f"rise of the loss, {what}", ball)
            columns.append((f"{ball} {rho:g}, {what}", lines, rho, 1))
    columns += [
        ("largest eigenvalue", lines_of(numbers, "eigenvalue"), 1.0, 1),
        ("trace", lines_of(numbers, "trace"), None, 1),
    ]
    networks = list(columns[0][1])
    rows = [
        ["networks", "seeds", *(name for name, *_ in columns)],
        ["---", *["---:"] * (len(columns) + 1)],
    ]
    for network in networks:
        cells = [_cell(lines[network][at], scale) for _, lines, at, scale in columns]
        rows.append([network, str(columns[0][1][network][None].count), *cells])
    return table(rows)


def _cell(value: Estimate, scale: float) -> str:
    half = f" ± {scale * (value.high - value.mean):.2g}" if value.count > 1 else ""
    return f"{scale * value.mean:.4g}{half}"


_SLICE_COLUMNS = ("network", "direction", "step", "ascent", "random", "loss", "seed")


def _slice_rows(slices: Mapping[str, Slices]) -> Iterable[dict[str, Any]]:
    """Yields the slices of each network (the number of its seed) and the plane of the first."""
    for network, known in slices.items():
        places = known.places.tolist()
        for name in ("ascent", "random"):
            for number, line in enumerate(getattr(known, name).tolist()):
                for place, loss in zip(places, line, strict=True):
                    row = {"network": network, "direction": name, "step": place}
                    yield row | {"loss": loss, "seed": number}
        for a, line in zip(places, known.plane.tolist(), strict=True):
            for b, loss in zip(places, line, strict=True):
                row = {"network": network, "direction": "plane", "ascent": a, "random": b}
                yield row | {"loss": loss, "seed": 0}


def _method(measures: Measures, about: dict[str, Any]) -> str:
    normalised = (
        "Logits have mean 0 and variance 1 per example. " if measures.normalised_logits else ""
    )
    return f"""## How to read it

* Measured on the first {about["examples"]:,} training examples, with the labels of the training,
  at the parameters of the best epoch. The loss is the cross-entropy without label smoothing.
  {normalised}Batch statistics are the running ones and stay fixed. Means and 95 % intervals are
  over seeds.
* *one step*: at the point that a step of SAM (l2) or of ASAM (adaptive, without its eta) takes its
  gradient at. *worst case*: the worst point that an ascent of {measures.steps} gradients inside the
  ball finds; it is a lower bound. *random*: the mean over {measures.directions} directions.
* A rescaling of layers that leaves the function as it is changes the rise in an l2 ball, and the
  eigenvalues, but not the rise in an adaptive ball. Compare networks only within one recipe: across
  recipes, sharpness does not predict the test error
  ([2302.07011](https://arxiv.org/abs/2302.07011)).
* sharpness.csv has every number of every seed, with residuals of eigenvalues and standard errors of
  the trace and of the density."""
