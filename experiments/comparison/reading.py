"""Reads the results of comparisons and of runs of experiments.train."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from experiments.comparison.grid import TASK, task_of
from experiments.comparison.results import (
    ABOUT,
    COLUMNS,
    CURVE,
    CURVES,
    RUNS,
    Comparison,
    Result,
    result_of,
)
from experiments.config.config import Task
from experiments.config.hyperparameters import HYPERPARAMETERS
from experiments.config.recipe import PERTURBATION_OPTIONS, resolve
from experiments.run.folder import CONFIG, SEALED, RunFolder, read_config, read_metrics
from experiments.system import schema, seals
from experiments.system.command_line import ArgumentError

# A comparison of an older version may lack an option.
_TASK_DEFAULTS = {
    field.name: field.default for field in dataclasses.fields(Task) if field.name in TASK
}


@dataclasses.dataclass(frozen=True)
class About:
    """The content of comparison.json: of a grid, or of merged results.

    Attributes:
        task: what all runs have in common.
        grid: the options of the grid.
        origins: see :class:`Comparison`; None for a grid.
        runs: number of runs of the grid.
        finished: number of results so far.
        continued: versions and hardware of each continuation that had others.

    The other attributes say how the grid was computed.
    """

    task: dict[str, Any]
    grid: dict[str, Any] | None = None
    origins: list[dict[str, Any]] | None = None
    runs: int | None = None
    command: str | None = None
    versions: dict[str, str] | None = None
    hardware: dict[str, Any] | None = None
    finished: int | None = None
    continued: list[dict[str, Any]] | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """The parts that are there."""
        return {name: part for name, part in vars(self).items() if part is not None}


@dataclasses.dataclass(frozen=True)
class _Point:
    """A line of curves.csv. A run that diverged has numbers that are not finite."""

    run: int
    epoch: int
    loss: float
    validation_accuracy: float
    validation_loss: float


# A line of runs.csv. A comparison of an older version may lack columns.
_Row: Any = dataclasses.make_dataclass(
    "_Row",
    [
        ("run", int),
        ("method", str),
        ("epochs", int),
        ("seed", int),
        ("gradients", float),
        ("steps", int),
        ("status", Literal["finished", "diverged"]),
        *((name, float | None, None) for name in ("validation_accuracy", "test_accuracy")),
        ("checkpoint_epoch", int | None, None),
        ("last_test_accuracy", float | None, None),
        ("milliseconds_per_step", float | None, None),
        ("runs_at_once", int | None, None),
        ("confirms", int, 0),
        *((name, float | None, None) for name in HYPERPARAMETERS),
    ],
    frozen=True,
)


def read_results(folder: Path) -> list[Comparison]:
    """Returns the results in a folder of `experiments.compare` or `experiments.train`.

    If it contains such folders, the results are those of all of them.

    Raises:
        ArgumentError: if there are no results, or a run is not finished.
    """
    found = list(_folders(folder)) if folder.is_dir() else []
    return list(map(_read, found or [folder]))


def sealed_files(folder: Path) -> list[str]:
    """Returns the names of files in a folder of results or of a run that are read again."""
    networks = sorted(
        path.relative_to(folder).as_posix() for path in folder.glob("networks/*.json")
    )
    return [ABOUT, RUNS, CURVES, *networks, *SEALED]


def _folders(folder: Path) -> Iterator[Path]:
    if (folder / ABOUT).exists() or (folder / CONFIG).exists():
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            yield from _folders(child)


def _read(folder: Path) -> Comparison:
    if (folder / ABOUT).exists():
        return _read_comparison(folder)
    if not (folder / CONFIG).exists():
        raise ArgumentError(f"{folder} has no results: it has neither {ABOUT} nor {CONFIG}")
    try:
        return _read_run(folder)
    except ValueError as error:
        raise ArgumentError(f"{folder} cannot be read as results: {error}") from error


def there_are_any(folder: Path) -> bool:
    """Returns whether the comparison in this folder has a result."""
    return (folder / RUNS).exists() and bool(_read_rows(folder))


def read_about(folder: Path) -> About:
    """Returns comparison.json.

    Raises:
        ArgumentError: if it is damaged.
    """
    return schema.json_as(About, seals.read_sealed(folder, ABOUT), folder / ABOUT)


def _read_comparison(folder: Path) -> Comparison:
    about = read_about(folder)
    curves: dict[int, list[dict[str, float]]] = {}
    # A copy of results may lack this file, which is the largest.
    if (folder / CURVES).exists():
        content = seals.read_sealed(folder, CURVES)
        for point in schema.csv_as(_Point, content, folder / CURVES, finite=False):
            row = {name: getattr(point, name) for name in CURVE}
            curves.setdefault(point.run, []).append(row)
    results = [_result(row, curves.get(row.run, [])) for row in _read_rows(folder)]
    if not results:
        raise ArgumentError(f"{folder} cannot be read as results: no run has finished yet")
    origins = about.origins or [about.origin | {"finished": len(results)}]
    try:
        return Comparison(_task_of(about.task), results, origins)
    except ValueError as error:
        raise ArgumentError(f"{folder / ABOUT} cannot be read: {error}") from error


def _read_rows(folder: Path) -> list[Any]:
    content = seals.read_sealed(folder, RUNS)
    rows = schema.csv_as(_Row, content, folder / RUNS, optional=True)
    seen = set()
    for row in rows:
        key = _result(row, []).key
        if key in seen:
            raise ArgumentError(f"{folder / RUNS} cannot be read: run {row.run} is there twice")
        seen.add(key)
    return rows


def _task_of(recorded: dict[str, Any]) -> dict[str, Any]:
    """Returns a task as this version records it."""
    # An older version recorded what is part of a method now.
    usual = PERTURBATION_OPTIONS | {"group_size": recorded["batch_size"]}
    for name, nothing in usual.items():
        if recorded.get(name) not in (None, nothing):
            raise ValueError(f"its runs with {name} {recorded[name]} are of an older version")
    return {name: recorded.get(name, default) for name, default in _TASK_DEFAULTS.items()}


def _result(row: Any, curve: list[dict[str, float]]) -> Result:
    given = {name: getattr(row, name) for name in COLUMNS}
    return Result(
        **given | {"gradients": _whole_if_it_is(row.gradients), "confirms": bool(row.confirms)},
        # A method has only its own hyperparameters.
        values={
            name: value for name in HYPERPARAMETERS if (value := getattr(row, name)) is not None
        },
        curve=curve,
    )


def _whole_if_it_is(number: float) -> float:
    return int(number) if number.is_integer() else number


def _read_run(folder: Path) -> Comparison:
    config = read_config(folder)
    recipe = resolve(config)
    summary = RunFolder(folder).read_summary()
    if summary is None or summary.status in ("started", "interrupted"):
        raise ValueError("the run is not finished")
    if summary.changed:
        raise ValueError(f"the run was changed when it was resumed: {', '.join(summary.changed)}")
    if recipe.batch_statistics == "per-device":
        raise ValueError("runs with --batch-statistics per-device are another method")
    rows = read_metrics(folder)
    seconds = sum(1 / row.examples_per_second for row in rows) / max(len(rows), 1)
    names = ("validation_accuracy", "checkpoint_epoch", "test_accuracy", "last_test_accuracy")
    best: Any = tuple(getattr(summary, name) for name in names)
    curve = [{name: getattr(row, name) for name in CURVE} for row in rows]
    result = result_of(
        recipe,
        summary.steps,
        curve,
        best if summary.is_finished else None,
        1000 * seconds * recipe.batch_size,
        1,
    )
    about = {
        "command": f"a run of experiments.train: {folder.name}",
        "versions": summary.versions,
        "hardware": {"device": summary.device, "devices": summary.devices},
    }
    return Comparison(task_of(config, recipe), [result], [about])
