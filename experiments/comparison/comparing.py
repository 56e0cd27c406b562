"""A comparison from start to end: trains a grid, or reads results, and reports them."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.comparison import plan, report, results
from experiments.comparison.grid import Grid
from experiments.comparison.grid_run import GridRun, examples_of, forget_unfinished
from experiments.comparison.merging import merged
from experiments.comparison.reading import read_about, read_results, there_are_any
from experiments.comparison.results import ABOUT, Comparison
from experiments.comparison.table import rows_of, usual_baseline
from experiments.config.config import option_of
from experiments.config.recipe import PERTURBATION_OPTIONS, Recipe
from experiments.run.model import model_of
from experiments.system import files, machine
from experiments.system.command_line import ArgumentError
from experiments.system.interruption import Interruption


def compare(
    grid: Grid,
    folder: Path,
    *,
    command: str,
    baseline: str | None = None,
    replicas_at_once: int | None = None,
    keep_networks: bool = True,
) -> None:
    """Trains the runs of a grid that have no result in the folder, and writes the report.

    Args:
        grid: the runs to compare.
        folder: where results are written. A comparison of the same grid in it is resumed.
        command: the command line to record with the results.
        baseline: label of the method that the others are compared with; by default sgd if it is
            trained, else the first.
        replicas_at_once: largest number of runs at once; None for as many as is fast and fits.
        keep_networks: whether to keep the parameters of every run.

    Raises:
        ArgumentError: if the grid does not fit the data, the memory or what is in the folder.
        DatasetError: if the data set is not there.
        CheckpointError: if a checkpoint of unfinished runs cannot be read.
        KeyboardInterrupt: after a signal. The same call resumes.
    """
    asked, examples = grid.recipes, examples_of(grid)  # before anything is written
    for recipe in {recipe.label: recipe for recipe in asked}.values():
        model_of(recipe, examples.dataset)  # refuses what it cannot do, before the first run
    steps_per_epoch = examples.experiment(asked[0]).steps_per_epoch
    recipes = asked + grid.longer_plain(asked, steps_per_epoch)
    runs = len(recipes) + len({recipe.key[:2] for recipe in recipes}) * grid.confirm
    about = {"task": grid.task, "grid": _as_json(grid), "runs": runs, "command": command}
    about |= {"versions": machine.versions(), "hardware": machine.hardware()}
    reference = baseline or usual_baseline(grid.labels)
    print(plan.in_words(recipes, reference, steps_per_epoch, grid.confirm))
    with _locked(folder), Interruption() as interruption:
        comparison = _opened(folder, about)
        (origin,) = comparison.origins
        how = (examples, comparison, folder, replicas_at_once, keep_networks, interruption)
        if origin.get("finished", 0) < origin["runs"]:
            _note_continuation(origin, about)
            results.write_about(folder, origin)
        GridRun(grid, recipes, *how).train()
        confirming = confirming_runs(grid, recipes, comparison)
        GridRun(grid, confirming, *how).train()
        forget_unfinished(folder)
        # A method whose every candidate diverged had nothing to confirm.
        if origin["runs"] != len(recipes) + len(confirming):
            origin["runs"] = len(recipes) + len(confirming)
            results.write_about(folder, origin)
        report.write_report(folder, report.sections_of([comparison], baseline))


def confirming_runs(grid: Grid, recipes: Sequence[Recipe], comparison: Comparison) -> list[Recipe]:
    """Returns the runs that confirm the chosen values of each method with the fresh seeds.

    Args:
        grid: has the seeds.
        recipes: the runs that have chosen.
        comparison: their results, and possibly results of runs that confirm.
    """
    by_values = {recipe.key[:-1]: recipe for recipe in recipes}
    chosen = [
        by_values[row.chosen.results[0].key[:-1]]
        for row in rows_of(comparison)
        if row.chosen is not None
    ]
    # In the order of the search, in which runs that can share a program are neighbors.
    order = {recipe.key[:-1]: number for number, recipe in enumerate(recipes)}
    chosen.sort(key=lambda recipe: order[recipe.key[:-1]])
    return [
        dataclasses.replace(recipe, seed=seed) for recipe in chosen for seed in grid.fresh_seeds
    ]


def report_again(folders: Sequence[Path], folder: Path, baseline: str | None = None) -> None:
    """Writes one report of the results in several folders.

    Args:
        folders: folders of comparisons or of runs of experiments.train, or folders of such.
        folder: a new folder to write to.
        baseline: see :func:`compare`.

    Raises:
        ArgumentError: if results cannot be read, or the folder exists.
    """
    comparisons = merged(itertools.chain.from_iterable(map(read_results, folders)))
    sections = report.sections_of(comparisons, baseline)
    try:
        files.check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--output must be a new folder: {error}") from error
    report.write_report(folder, sections)
    results.write_merged(folder, comparisons)


def _opened(folder: Path, about: dict[str, Any]) -> Comparison:
    """Returns the comparison of this grid in the folder. In a new folder it has no results."""
    grid = about["grid"]
    begun = [folder / "runs.csv", folder / "under-way", folder / "runs"]
    if not any(known.exists() for known in begun):
        return Comparison(about["task"], [], [about])
    defaults = _as_json(Grid())
    known = read_about(folder)
    if known.grid is None or "base" not in known.task:
        raise ArgumentError(
            f"--output {folder} has no comparison that can be resumed: give another folder"
        )
    # A comparison of an older version may lack an option, and names the default optimizer.
    values = {name: known.grid.get(name, defaults.get(name)) for name in grid}
    values["base"], grid = known.task["base"], grid | {"base": about["task"]["base"]}
    # What an older version could ask for, and this one cannot.
    values |= {name: value for name, value in known.grid.items() if name not in grid}
    nothing = defaults | PERTURBATION_OPTIONS
    if odd := [name for name in values if values[name] != grid.get(name, nothing.get(name))]:
        raise ArgumentError(
            f"--output {folder} has another comparison: its {option_of(odd[0])} is "
            f"{values[odd[0]]}, not {grid.get(odd[0])}"
        )
    if there_are_any(folder):
        (comparison,) = read_results(folder)
        return comparison
    return Comparison(about["task"], [], [known.origin])


def _note_continuation(origin: dict[str, Any], about: dict[str, Any]) -> None:
    """Records versions and hardware in `origin` if they have changed."""
    now = {name: about[name] for name in ("versions", "hardware")}
    before = [origin, *origin.get("continued", [])][-1]
    if now != {name: before.get(name) for name in now}:
        origin["continued"] = [*origin.get("continued", []), now]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes the folder unless it has a comparison, and locks it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(files.locked(folder))
        if not (folder / ABOUT).exists():
            files.check_new(folder)  # under the lock
    except BlockingIOError as error:
        raise ArgumentError(f"--output {error}") from error
    except OSError as error:
        raise ArgumentError(f"--output must be a folder to write to: {error}") from error
    with lock:
        yield


def _as_json(grid: Grid) -> dict[str, Any]:
    """Returns the options that make two comparisons the same, without paths and workers."""
    names = {field.name for field in dataclasses.fields(Grid)} - {"data_dir", "workers"}
    # JSON makes tuples lists, as in the file.
    return json.loads(json.dumps({name: getattr(grid, name) for name in sorted(names)}))
