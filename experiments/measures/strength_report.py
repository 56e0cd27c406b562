"""The report of perturbation strengths, as Markdown and as one HTML page."""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.comparison import drawing
from experiments.comparison.report import write_pages
from experiments.comparison.significance import Estimate, estimate, estimates_of
from experiments.comparison.words import computed_with, points, shell, task_in_words
from experiments.measures.strength import TRAINING_LOSS
from experiments.measures.strength_run import Measured
from experiments.system import files

Key = tuple[str, int, str, float]


def write_strength_report(
    folder: Path, measured: Sequence[Measured], task: dict[str, Any], about: dict[str, Any]
) -> None:
    """Writes strength.csv, report.md, report.html and the plots.

    Args:
        folder: an existing folder.
        measured: see :func:`experiments.measures.strength_run.measured_along`.
        task: what all runs have in common.
        about: command, versions and hardware.
    """
    columns = [field.name for field in dataclasses.fields(Measured)]
    files.write_csv(folder / "strength.csv", columns, [dataclasses.asdict(m) for m in measured])
    images: dict[str, str] = {}
    parts = [f"# Strength of perturbations on {task['dataset']}", f"{task_in_words(task)}."]
    parts.append(_in_short(measured))
    for number, method in enumerate(dict.fromkeys(m.method for m in measured), 1):
        rows = [m for m in measured if m.method == method]
        file = f"{number}-error.svg"
        rises = {f"epoch {epoch}": lines for epoch, lines in _rises(rows).items()}
        labels = ("rho", "rise of the error (points)")
        images[file] = drawing.panels(rises, *labels, xscale="log", percent=True)
        parts.append(f"## Networks trained by {method}")
        parts.append(f"![Rise of the error against rho, by epoch]({file})")
        parts += [f"### After epoch {epoch}\n\n{_table(rows, epoch)}" for epoch in _epochs(rows)]
    parts += [_METHOD, shell([about["command"]]), computed_with(about)]
    text = "\n\n".join(parts) + "\n"
    write_pages(folder, text, images)


def paired(measured: Sequence[Measured]) -> Iterator[tuple[Measured, float]]:
    """Yields how much more the error rises than by ascending the training loss.

    Both are of the same network and the same radius.
    """
    plain = {(m.method, m.epoch, m.rho, m.seed): m for m in measured if m.ascended == TRAINING_LOSS}
    for m in measured:
        base = plain.get((m.method, m.epoch, m.rho, m.seed))
        if base is not None and base is not m:
            yield m, m.error_rise - base.error_rise


def differences_of(measured: Sequence[Measured]) -> dict[Key, Estimate]:
    """Returns the paired differences by method, epoch, ascended loss and radius, over the seeds."""
    known: dict[Key, list[float | None]] = {}
    for m, difference in paired(measured):
        known.setdefault((m.method, m.epoch, m.ascended, m.rho), []).append(difference)
    return {key: estimate(values) for key, values in known.items()}


def by_radius(measured: Sequence[Measured]) -> dict[tuple[str, float], Estimate]:
    """Returns the paired differences by ascended loss and radius.

    Each seed counts once, with its mean over methods and epochs.
    """
    of_seed: dict[tuple[str, float, int], list[float]] = {}
    for m, difference in paired(measured):
        of_seed.setdefault((m.ascended, m.rho, m.seed), []).append(difference)
    known = estimates_of(
        (ascended, rho, statistics.fmean(values)) for (ascended, rho, _), values in of_seed.items()
    )
    return {(name, rho): value for name, line in known.items() for rho, value in line.items()}


def _in_short(measured: Sequence[Measured]) -> str:
    """Answers for each loss and radius, over all methods and epochs."""
    known = by_radius(measured)
    radii = sorted({rho for _, rho in known})
    lines = [
        "Does the error of a batch rise more if this loss is ascended instead of the training "
        "loss, at the same radius? By how many points, over all methods and epochs below:",
        "",
        f"| ascended | {' | '.join(f'rho {rho:g}' for rho in radii)} |",
        f"| --- |{' ---: |' * len(radii)}",
    ]
    for ascended in dict.fromkeys(name for name, _ in known):
        cells = (points(known[ascended, rho]) for rho in radii)
        lines.append(f"| {ascended} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _epochs(rows: Sequence[Measured]) -> list[int]:
    return sorted({m.epoch for m in rows})


def _rises(rows: Sequence[Measured]) -> dict[int, dict[str, dict[float, Estimate]]]:
    """Returns the rise of the error by epoch, loss and radius."""
    return {
        epoch: estimates_of((m.ascended, m.rho, m.error_rise) for m in rows if m.epoch == epoch)
        for epoch in _epochs(rows)
    }


def _table(rows: Sequence[Measured], epoch: int) -> str:
    here = [m for m in rows if m.epoch == epoch]
    radii = sorted({m.rho for m in here})
    rises, differences = _rises(here)[epoch], differences_of(here)
    cosines: dict[str, list[float | None]] = {}
    for m in here:
        cosines.setdefault(m.ascended, []).append(m.cosine)
    lines = [
        f"| ascended | cosine | {' | '.join(f'rho {rho:g}' for rho in radii)} |",
        f"| --- | ---: |{' ---: |' * len(radii)}",
    ]
    for name, line in rises.items():
        cells = []
        for rho in radii:
            if name == TRAINING_LOSS:
                cells.append(f"{100 * line[rho].mean:+.2f}")
                continue
            cells.append(points(differences[here[0].method, epoch, name, rho]))
        lines.append(f"| {name} | {estimate(cosines[name]).mean:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


_METHOD = f"""## How to read it

* In the row *{TRAINING_LOSS}*: how many points more of a batch are wrong at w + eps than at w, if
  the training loss is ascended. In the other rows: how many points more than that, with the half
  width of the 95 % interval over seeds, paired by seed. **Bold** is stronger, *italic* weaker, both
  beyond their interval; the intervals are not corrected for their number.
* eps is one step in an l2 ball, from the gradient of one batch, with the batch's own statistics, as
  in a training step. The means are over batches and seeds.
* *cosine*: between the gradients of the ascended loss and of the training loss. mu and alpha change
  only the direction, never the length of eps."""
