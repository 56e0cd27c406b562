"""The report of perturbation strengths, as Markdown and as one HTML page."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.comparison import plots
from experiments.comparison.report import html_page
from experiments.comparison.significance import Estimate, estimate
from experiments.comparison.words import computed_with, task_in_words
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
        images[file] = plots.strengths(_rises(rows))
        parts.append(f"## Networks trained by {method}")
        parts.append(f"![Rise of the error against rho, by epoch]({file})")
        parts += [f"### After epoch {epoch}\n\n{_table(rows, epoch)}" for epoch in _epochs(rows)]
    parts += [_METHOD, f"```sh\n{about['command']}\n```", computed_with(about)]
    text = "\n\n".join(parts) + "\n"
    for name, image in images.items():
        files.write_text(folder / name, image)
    files.write_text(folder / "report.md", text)
    files.write_text(folder / "report.html", html_page(text, images))


def differences_of(measured: Sequence[Measured]) -> dict[Key, Estimate]:
    """Returns how much more the error rises than by ascending the training loss.

    The means are over the seeds, paired: by method, epoch, ascended loss and radius.
    """
    values = {(m.method, m.epoch, m.ascended, m.rho, m.seed): m.error_rise for m in measured}
    paired: dict[Key, list[float | None]] = {}
    for (method, epoch, ascended, rho, seed), value in values.items():
        base = values.get((method, epoch, TRAINING_LOSS, rho, seed))
        if ascended != TRAINING_LOSS and base is not None:
            paired.setdefault((method, epoch, ascended, rho), []).append(value - base)
    return {key: estimate(known) for key, known in paired.items()}


def _sign(value: Estimate) -> int:
    """Returns whether the 95 % interval is above (1) or below (-1) zero, or contains it (0)."""
    return int(value.low > 0) - int(value.high < 0)


def _in_short(measured: Sequence[Measured]) -> str:
    """Counts, for each loss, where it is stronger and where it is weaker."""
    known = differences_of(measured)
    lines = []
    for ascended in dict.fromkeys(key[2] for key in known):
        signs = [_sign(value) for key, value in known.items() if key[2] == ascended]
        mean = sum(v.mean for key, v in known.items() if key[2] == ascended) / len(signs)
        lines.append(
            f"* **{ascended}**: stronger in {signs.count(1)}, weaker in {signs.count(-1)} of "
            f"{len(signs)} cases (method, epoch and radius); {100 * mean:+.2f} points of error on "
            "average."
        )
    return "\n".join(
        [
            "Does the error of a batch rise more if this loss is ascended instead of the training "
            "loss, at the same radius? (95 % intervals over seeds, not corrected.)",
            "",
            *lines,
        ]
    )


def _epochs(rows: Sequence[Measured]) -> list[int]:
    return sorted({m.epoch for m in rows})


def _rises(rows: Sequence[Measured]) -> dict[int, dict[str, dict[float, Estimate]]]:
    """Returns the rise of the error by epoch, loss and radius."""
    by_epoch: dict[int, dict[str, dict[float, list[float | None]]]] = {}
    for m in rows:
        line = by_epoch.setdefault(m.epoch, {}).setdefault(m.ascended, {})
        line.setdefault(m.rho, []).append(m.error_rise)
    return {
        epoch: {
            name: {rho: estimate(values) for rho, values in line.items()}
            for name, line in lines.items()
        }
        for epoch, lines in by_epoch.items()
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
            value = differences[here[0].method, epoch, name, rho]
            bold = {1: "**", 0: "", -1: "*"}[_sign(value)]
            half = f" ± {100 * (value.high - value.mean):.2f}" if value.count > 1 else ""
            cells.append(f"{bold}{100 * value.mean:+.2f}{half}{bold}")
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
