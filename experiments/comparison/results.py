"""The results of a comparison, as files that other programs can read.

comparison.json  the grid, and how it was computed: command, versions, hardware
runs.csv         one line per run: method, hyperparameters, seed, accuracies, cost
curves.csv       one line per epoch of a run

Several tasks have a subfolder each.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.comparison.grid import TASK, task_of
from experiments.config.config import Task
from experiments.config.hyperparameters import HYPERPARAMETERS
from experiments.config.recipe import PERTURBATION_OPTIONS, Recipe, resolve
from experiments.run.folder import RunFolder, read_config
from experiments.system import files
from experiments.system.command_line import ArgumentError

FINISHED, DIVERGED = "finished", "diverged"
_CURVE = ("epoch", "loss", "validation_accuracy", "validation_loss")
# A comparison of an older version may lack an option.
_TASK_DEFAULTS = {
    field.name: field.default for field in dataclasses.fields(Task) if field.name in TASK
}


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


_COLUMNS = tuple(
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
        columns = {name: getattr(result, name) for name in _COLUMNS}
        columns["confirms"] = int(result.confirms)
        lines.append({"run": number, **columns, **result.values})
        points += [{"run": number, **row} for row in result.curve]
    # In this order, since curves without a run are ignored.
    files.write_csv(folder / "curves.csv", ("run", *_CURVE), points)
    files.write_csv(folder / "runs.csv", ("run", *_COLUMNS, *HYPERPARAMETERS), lines)


def write_merged(folder: Path, comparisons: Sequence[Comparison]) -> None:
    """Writes one comparison into the folder itself, or several into subfolders."""
    for number, comparison in enumerate(comparisons, 1):
        part = folder if len(comparisons) == 1 else folder / str(number)
        part.mkdir(exist_ok=True)
        write_results(part, comparison)
        write_about(part, {"task": comparison.task, "origins": comparison.origins})


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Writes comparison.json."""
    files.write_text(folder / "comparison.json", json.dumps(about, indent=2) + "\n")


def read_results(folder: Path) -> list[Comparison]:
    """Returns the results in a folder of `experiments.compare` or `experiments.train`.

    If it contains such folders, the results are those of all of them.

    Raises:
        ArgumentError: if there are no results, or a run is not finished.
    """
    found = list(_folders(folder)) if folder.is_dir() else []
    return list(map(_read, found or [folder]))


def _folders(folder: Path) -> Iterator[Path]:
    if (folder / "comparison.json").exists() or (folder / "config.json").exists():
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            yield from _folders(child)


def _read(folder: Path) -> Comparison:
    try:
        is_comparison = (folder / "comparison.json").exists()
        return _read_comparison(folder) if is_comparison else _read_run(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{folder} cannot be read as results: {error}") from error


def there_are_any(folder: Path) -> bool:
    """Returns whether the comparison in this folder has a result."""
    path = folder / "runs.csv"
    return path.exists() and bool(files.read_csv(path))


def _read_comparison(folder: Path) -> Comparison:
    about = json.loads((folder / "comparison.json").read_text())
    curves: dict[str, list[dict[str, float]]] = {}
    # A copy of results may lack this file, which is the largest.
    path = folder / "curves.csv"
    for row in files.read_csv(path) if path.exists() else []:
        curves.setdefault(row["run"], []).append(_point(row))
    results = [
        _result(row, curves.get(row["run"], [])) for row in files.read_csv(folder / "runs.csv")
    ]
    if not results:
        raise ValueError("no run has finished yet")
    origins = about.get("origins", [about | {"finished": len(results)}])
    return Comparison(_task_of(about["task"]), results, origins)


def _task_of(recorded: dict[str, Any]) -> dict[str, Any]:
    """Returns a task as this version records it."""
    # An older version recorded what is part of a method now.
    usual = PERTURBATION_OPTIONS | {"group_size": recorded["batch_size"]}
    for name, nothing in usual.items():
        if recorded.get(name) not in (None, nothing):
            raise ValueError(f"its runs with {name} {recorded[name]} are of an older version")
    return {name: recorded.get(name, default) for name, default in _TASK_DEFAULTS.items()}


def _point(row: dict[str, str]) -> dict[str, float]:
    return {name: float(row[name]) for name in _CURVE} | {"epoch": int(row["epoch"])}


def _result(row: dict[str, str], curve: list[dict[str, float]]) -> Result:
    def number(name: str, type_: Any) -> Any:
        # A comparison of an older version may lack a column.
        return type_(row[name]) if row.get(name) else None

    return Result(
        method=row["method"],
        status=row["status"],
        # A comparison of an older version may lack a hyperparameter.
        values={name: float(row[name]) for name in HYPERPARAMETERS if row.get(name)},
        curve=curve,
        confirms=bool(number("confirms", int)),
        gradients=_whole_if_it_is(float(row["gradients"])),
        **{
            name: number(name, int)
            for name in ("epochs", "seed", "steps", "checkpoint_epoch", "runs_at_once")
        },
        **{
            name: number(name, float)
            for name in (
                "validation_accuracy",
                "test_accuracy",
                "last_test_accuracy",
                "milliseconds_per_step",
            )
        },
    )


def _whole_if_it_is(number: float) -> float:
    return int(number) if number.is_integer() else number


def _read_run(folder: Path) -> Comparison:
    config = read_config(folder)
    recipe = resolve(config)
    summary = RunFolder(folder).read_summary()
    status = summary.get("status", "started")
    if status in ("started", "interrupted"):
        raise ValueError("the run is not finished")
    if recipe.batch_statistics == "per-device":
        raise ValueError("runs with --batch-statistics per-device are another method")
    finished = status == FINISHED
    rows = files.read_csv(folder / "metrics.csv")
    speeds = [float(row["examples_per_second"]) for row in rows]
    seconds = sum(1 / speed for speed in speeds) / max(len(speeds), 1) * recipe.batch_size
    names = ("validation_accuracy", "checkpoint_epoch", "test_accuracy", "last_test_accuracy")
    best: Any = tuple(summary.get(name) for name in names)
    curve = [_point(row) for row in rows]
    result = result_of(
        recipe, summary["steps"], curve, best if finished else None, 1000 * seconds, 1
    )
    about = {
        "command": f"a run of experiments.train: {folder.name}",
        "versions": summary["versions"],
        "hardware": {"device": summary["device"], "devices": summary["devices"]},
    }
    return Comparison(task_of(config, recipe), [result], [about])
