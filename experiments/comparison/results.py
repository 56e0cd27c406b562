"""The results of a comparison, as files that other programs can read.

comparison.json  the grid, and how it was computed: command, versions, hardware
runs.csv         one line per run: method, hyperparameters, seed, accuracies, cost
curves.csv       one line per epoch of a run

seal.json        the digests of these files, which are read again

Several tasks have a subfolder each.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config.hyperparameters import HYPERPARAMETERS
from experiments.config.recipe import Recipe
from experiments.system import files, seals

FINISHED, DIVERGED = "finished", "diverged"
ABOUT, RUNS, CURVES = "comparison.json", "runs.csv", "curves.csv"
CURVE = ("epoch", "loss", "validation_accuracy", "validation_loss")


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one run.

    Attributes:
        method: label of the method.
        epochs: number of epochs.
        seed: random seed.
        values: hyperparameters by name.
        gradients: number of batch gradients per step, on average.
        steps: number of steps.
        status: "finished", or "diverged" if a loss was not finite; then it has no accuracies.
        validation_accuracy: validation accuracy of the best epoch.
        checkpoint_epoch: number of the best epoch, the last one if several are equal.
        test_accuracy: test accuracy of the best epoch.
        last_test_accuracy: test accuracy of the last epoch; None if it was not recorded.
        milliseconds_per_step: the run's share of the time of all runs computed at once.
        runs_at_once: number of runs computed at once.
        curve: one row per epoch.
        confirms: whether the values were chosen before, by other seeds.
    """

    method: str
    epochs: int
    seed: int
    values: dict[str, float]
    gradients: float
    steps: int
    status: str
    validation_accuracy: float | None
    checkpoint_epoch: int | None
    test_accuracy: float | None
    last_test_accuracy: float | None
    milliseconds_per_step: float
    runs_at_once: int
    curve: list[dict[str, float]] = dataclasses.field(repr=False)
    confirms: bool = False

    @property
    def key(self) -> tuple:
        """Equal to :attr:`experiments.config.recipe.Recipe.key` of the run."""
        return (self.method, self.epochs, tuple(sorted(self.values.items())), self.seed)


def result_of(
    recipe: Recipe,
    steps: int,
    curve: list[dict[str, float]],
    best: tuple[float, int, float, float | None] | None,
    milliseconds_per_step: float,
    runs_at_once: int,
) -> Result:
    """Returns the result of a run.

    Args:
        recipe: what was trained.
        steps: number of steps.
        curve: one row per epoch.
        best: validation accuracy, number and test accuracy of the best epoch, and test accuracy of
            the last epoch; None if the run diverged.
        milliseconds_per_step: see :class:`Result`.
        runs_at_once: see :class:`Result`.
    """
    accuracy, epoch, test_accuracy, last_test_accuracy = best or (None,) * 4
    return Result(
        recipe.label,
        recipe.epochs,
        recipe.seed,
        {name: float(value) for name, value in recipe.hyperparameters.items()},
        recipe.gradients_per_step(steps),
        steps,
        FINISHED if best else DIVERGED,
        accuracy,
        epoch,
        test_accuracy,
        last_test_accuracy,
        milliseconds_per_step,
        runs_at_once,
        curve,
    )


COLUMNS = tuple(
    field.name for field in dataclasses.fields(Result) if field.name not in ("values", "curve")
)


@dataclasses.dataclass
class Comparison:
    """The results of one task.

    Attributes:
        task: what all runs have in common.
        results: one per run.
        origins: the comparison.json of each folder of results: how they were computed.
    """

    task: dict[str, Any]
    results: list[Result]
    origins: list[dict[str, Any]]


def write_results(folder: Path, comparison: Comparison) -> None:
    """Writes runs.csv and curves.csv, each of them whole or not at all."""
    lines, points = [], []
    for number, result in enumerate(comparison.results):
        columns = {name: getattr(result, name) for name in COLUMNS}
        columns["confirms"] = int(result.confirms)
        lines.append({"run": number, **columns, **result.values})
        points += [{"run": number, **row} for row in result.curve]
    # In this order, since curves without a run are ignored.
    texts = {CURVES: files.csv_of(("run", *CURVE), points)}
    texts[RUNS] = files.csv_of(("run", *COLUMNS, *HYPERPARAMETERS), lines)
    seals.write_sealed(folder, texts)


def write_merged(folder: Path, comparisons: Sequence[Comparison]) -> None:
    """Writes one comparison into the folder itself, or several into subfolders."""
    for number, comparison in enumerate(comparisons, 1):
        part = folder if len(comparisons) == 1 else folder / str(number)
        part.mkdir(exist_ok=True)
        write_results(part, comparison)
        write_about(part, {"task": comparison.task, "origins": comparison.origins})


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Writes comparison.json."""
    seals.write_sealed(folder, {ABOUT: json.dumps(about, indent=2) + "\n"})
