"""The report of robust accuracies, as Markdown and as one HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.comparison import drawing
from experiments.comparison.report import write_pages
from experiments.comparison.significance import Estimate, estimate, estimates_of
from experiments.comparison.words import computed_with, points, shell, table, task_in_words
from experiments.measures.attacks import WORST, Attack
from experiments.step.attack import LEVELS
from experiments.system import files


class Robust(NamedTuple):
    """An accuracy of one network.

    Attributes:
        network: name of the networks that differ only in their seed.
        seed: random seed.
        norm: "linf" or "l2"; "" without an attack.
        radius: in units of 1/255; 0 without an attack.
        steps: number of gradients of the attack.
        source: networks that the attack was computed against; "" for the network itself.
        loss: the ascended loss, or "worst" for all of them.
        accuracy: share of correct predictions.
    """

    network: str
    seed: int
    norm: str
    radius: float
    steps: int
    source: str
    loss: str
    accuracy: float


class Check(NamedTuple):
    """One check that gradients are not masked.

    Attributes:
        name: what should be the case.
        network: the networks.
        numbers: what was found.
        holds: whether it is the case; None if it could not be checked.
    """

    name: str
    network: str
    numbers: str
    holds: bool | None


def write_robustness_report(
    folder: Path,
    robust: Sequence[Robust],
    attacks: Sequence[Attack],
    checks: Sequence[Check],
    of_checks: Sequence[Robust],
    baseline: str,
    task: dict[str, Any],
    about: dict[str, Any],
) -> None:
    """Writes robustness.csv, checks.csv, report.md, report.html and the plot.

    Args:
        folder: an existing folder.
        robust: the clean accuracies, and those under the attacks.
        attacks: the attacks.
        checks: the checks of the attacks.
        of_checks: the accuracies behind the checks.
        baseline: name of the networks that the others are compared with.
        task: what all networks have in common.
        about: command, versions, hardware and number of examples.
    """
    files.write_csv(folder / "robustness.csv", Robust._fields, (r._asdict() for r in robust))
    files.write_csv(folder / "checks.csv", Robust._fields, (r._asdict() for r in of_checks))
    shown = [r for r in robust if r.loss == WORST]
    image = drawing.panels(
        {norm: _lines(shown, norm) for norm in dict.fromkeys(a.norm for a in attacks)},
        "radius (1/255)",
        "accuracy (%)",
        percent=True,
    )
    text = "\n\n".join(
        [
            f"# Robustness on {task['dataset']}",
            f"{task_in_words(task)}. {_WHAT}",
            "![Accuracy under the strongest attack, against its radius](1-robust.svg)",
            "Accuracy under the strongest attack: mean and 95 % interval over seeds.",
            _table(shown, attacks, baseline),
            "Accuracy in %, mean ± half of the 95 % interval over seeds. Below it, the difference "
            f"to {baseline} in points, paired by seed: **bold** is better, *italic* worse, both "
            "beyond their interval; the intervals are not corrected for their number.",
            "## Are the attacks strong enough?",
            _checks(checks),
            _method(attacks, about),
            shell([about["command"]]),
            computed_with(about),
        ]
    )
    write_pages(folder, text + "\n", {"1-robust.svg": image})


_WHAT = (
    "This measures mild robustness: small perturbations of images, against networks that were not "
    "trained to withstand them. It is no defense."
)


def _lines(robust: Sequence[Robust], norm: str) -> dict[str, dict[float, Estimate]]:
    """Returns clean and worst accuracies by network and radius."""
    return estimates_of((r.network, r.radius, r.accuracy) for r in robust if r.norm in ("", norm))


def _table(robust: Sequence[Robust], attacks: Sequence[Attack], baseline: str) -> str:
    columns = [("", 0.0), *((attack.norm, attack.radius) for attack in attacks)]
    names = ["clean", *(f"{attack.norm} {attack.radius:g}/{LEVELS}" for attack in attacks)]
    rows = [["networks", "seeds", *names], ["---", *["---:"] * (len(names) + 1)]]
    known: dict[tuple[str, str, float], dict[int, float]] = {}
    for r in robust:
        known.setdefault((r.network, r.norm, r.radius), {})[r.seed] = r.accuracy
    for network in dict.fromkeys(r.network for r in robust):
        cells = []
        for column in columns:
            ours, theirs = known[network, *column], known.get((baseline, *column), {})
            cell = _percent(estimate(list(ours.values())))
            common = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            if network != baseline and len(common) > 1:
                cell += f"<br>{points(estimate(common))}"
            cells.append(cell)
        rows.append([network, str(len(known[network, "", 0.0])), *cells])
    return table(rows)


def _percent(value: Estimate) -> str:
    half = f" ± {100 * (value.high - value.mean):.2f}" if value.count > 1 else ""
    return f"{100 * value.mean:.2f}{half}"


def _checks(checks: Sequence[Check]) -> str:
    words = {True: "holds", False: "**does not hold**", None: "not checked"}
    rows = [["check", "networks", "found", ""], ["---"] * 4]
    rows += [[c.name, c.network, c.numbers, words[c.holds]] for c in checks]
    return table(rows)


def _method(attacks: Sequence[Attack], about: dict[str, Any]) -> str:
    parts = (f"{a.norm} {a.radius:g}/{LEVELS} with step {a.step:g}/{LEVELS}" for a in attacks)
    first = attacks[0]
    return f"""## How to read it

* Projected gradient descent: {"; ".join(parts)}. {first.steps} gradients, {first.restarts} random
  starts for each of {" and ".join(first.losses)}; an example counts as right only if it is right
  after all of them. Radii and steps are of pixels in [0, 1]; the normalization is part of the
  network.
* Measured on the first {about["examples"]:,} test examples, at the parameters of the best epoch.
* robustness.csv has every accuracy of every seed, also by loss; checks.csv those of the checks."""


def rows_of_accuracies(
    network: str,
    seeds: Sequence[int],
    accuracies: dict[str, np.ndarray],
    attack: Attack | None = None,
    source: str = "",
) -> list[Robust]:
    """Returns the accuracies of some networks as rows; `attack` is None for the clean ones."""
    about = (attack.norm, attack.radius, attack.steps) if attack else ("", 0.0, 0)
    return [
        Robust(network, seed, *about, source, loss, float(value))
        for loss, values in accuracies.items()
        for seed, value in zip(seeds, values, strict=True)
    ]
