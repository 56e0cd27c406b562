"""Trained networks, read from runs and comparisons, with examples to measure them on."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.comparison.grid import Grid, task_of
from experiments.comparison.grid_run import examples_of
from experiments.comparison.networks import Kept, read_networks
from experiments.comparison.reading import read_about, read_results
from experiments.comparison.results import Comparison
from experiments.comparison.table import Row, row_name, rows_of
from experiments.config.recipe import Recipe
from experiments.run.folder import read_config
from experiments.run.restoring import restore
from experiments.step.evaluation import Predict
from experiments.step.feeds import Feed
from experiments.system.command_line import ArgumentError


class Sample(NamedTuple):
    """Some examples of a split.

    Attributes:
        images: uint8 or float32[examples, height, width, channels].
        labels: int32[seeds, examples]. With label noise they differ between seeds.
    """

    images: np.ndarray
    labels: np.ndarray


class Trained(NamedTuple):
    """Networks that differ only in their seed.

    Attributes:
        name: the method, and the hyperparameters that differ between the networks of a comparison.
        recipe: what they were trained with, with the first seed.
        seeds: their seeds.
        params: parameters of the best epoch. The first axis of every array is the seed.
        stats: batch statistics, likewise.
        predict: `predict(params, stats, images)` returns the logits of stored images. All networks
            that are read together have the same one, so that they share compiled programs.
        train: first examples of the training part.
        test: first examples of the test part.
    """

    name: str
    recipe: Recipe
    seeds: tuple[int, ...]
    params: Any
    stats: Any
    predict: Predict
    train: Sample
    test: Sample


def trained_in(
    folders: Sequence[Path], examples: int, *, every_candidate: bool, data_dir: Path | None = None
) -> tuple[list[Trained], dict[str, Any]]:
    """Reads networks of one task, and examples.

    Args:
        folders: run folders and folders of comparisons.
        examples: largest number of examples of each split.
        every_candidate: whether to read networks of all hyperparameters of a comparison, or of the
            chosen ones.
        data_dir: the folder of the data set; None for the one that a run has recorded.

    Returns:
        The networks, and what they have in common.

    Raises:
        ArgumentError: if a folder has no networks, or two folders have different tasks.
        CheckpointError: if a checkpoint cannot be read.
        DatasetError: if the data set is not there.
    """
    runs = [folder for folder in folders if not (folder / "comparison.json").is_file()]
    found: list[tuple[dict[str, Any], Trained]] = list(_of_runs(runs, examples, data_dir))
    for folder in folders:
        if folder not in runs:
            found += _of_comparison(folder, examples, every_candidate, data_dir)
    task = found[0][0]
    for other, trained in found:
        if odd := [name for name in task if task[name] != other[name]]:
            raise ArgumentError(
                f"{trained.name} was trained with another {odd[0].replace('_', ' ')} than "
                f"{found[0][1].name}: {other[odd[0]]}, not {task[odd[0]]}; measure them separately"
            )
    predict = found[0][1].predict
    return [trained._replace(predict=predict) for _, trained in found], task


def _of_runs(
    folders: Sequence[Path], examples: int, data_dir: Path | None
) -> Iterator[tuple[dict[str, Any], Trained]]:
    """Yields the networks of single runs. Runs that differ only in their seed are together."""
    groups: dict[str, list[Path]] = {}
    for folder in folders:
        config = read_config(folder)
        same = dataclasses.replace(config, seed=0, output=None, data_dir=None)
        groups.setdefault(repr(same), []).append(folder)
    for paths in groups.values():
        restored = [restore(path, devices=1, fsdp=1, data_dir=data_dir) for path in paths]
        experiments = [one.experiment for one in restored]
        networks = [jax.device_get((one.state.params, one.state.stats)) for one in restored]
        params, stats = jax.tree.map(lambda *x: np.stack(x), *networks)
        recipes = [experiment.recipe for experiment in experiments]
        rho = recipes[0].hyperparameters.get("rho")
        yield (
            task_of(read_config(paths[0]), recipes[0]),
            Trained(
                recipes[0].label if rho is None else f"{recipes[0].label}, rho {rho:g}",
                recipes[0],
                tuple(recipe.seed for recipe in recipes),
                params,
                stats,
                experiments[0].predict,
                _sample([experiment.train for experiment in experiments], examples),
                _sample([experiment.test for experiment in experiments], examples),
            ),
        )


def over_seeds(function: Any, axes: Sequence[int | None]) -> Any:
    """Returns `function`, of one network, for all seeds, jitted: one network after another.

    So it needs the memory of one network, however many seeds there are.

    Args:
        function: a function of one network.
        axes: for each argument, 0 if its first axis is the seed, otherwise None.
    """

    def mapped(*arguments: Any) -> Any:
        def of_seed(own: list[Any]) -> Any:
            left = iter(own)
            return function(*(x if axis is None else next(left) for x, axis in zipped))

        zipped = list(zip(arguments, axes, strict=True))
        return jax.lax.map(of_seed, [x for x, axis in zipped if axis is not None])

    return jax.jit(mapped)


def _of_comparison(
    folder: Path, examples: int, every_candidate: bool, data_dir: Path | None
) -> Iterator[tuple[dict[str, Any], Trained]]:
    (comparison,) = read_results(folder)
    grid = _grid_of(folder, data_dir)
    known = examples_of(grid)
    if not known.labels:
        raise ArgumentError(
            f"{folder} is a comparison on streamed images: name its runs, {folder}/runs/*"
        )
    first = known.experiment(grid.recipes[0], trained=True)
    runs = grid.recipes + grid.longer_plain(grid.recipes, first.steps_per_epoch)
    by_values = {recipe.key[:-1]: recipe for recipe in runs}
    for name, group in _candidates(comparison, every_candidate):
        recipes = [dataclasses.replace(by_values[key[:-1]], seed=key[-1]) for key in group]
        experiment = known.experiment(recipes[0], trained=True)
        shapes = jax.eval_shape(experiment.first_state)
        kept = read_networks(folder, recipes, Kept(shapes.params, shapes.stats))
        if kept is None:
            raise ArgumentError(
                f"{folder} has no networks of {name}: it was made with --no-keep-networks, or by "
                "an older version; make it again in a new folder"
            )
        train, test = (_first(feed, examples) for feed in (experiment.train, experiment.test))
        labels = [known.labels[recipe.seed].train[: len(train[1])] for recipe in recipes]
        yield (
            comparison.task,
            Trained(
                name,
                recipes[0],
                tuple(recipe.seed for recipe in recipes),
                *kept,
                experiment.predict,
                Sample(train[0], np.stack(labels)),
                Sample(test[0], np.stack([test[1]] * len(recipes))),
            ),
        )


def _grid_of(folder: Path, data_dir: Path | None) -> Grid:
    values = read_about(folder).grid
    if values is None:
        raise ArgumentError(f"{folder} has no grid: it is a report of several comparisons")
    # An older version recorded more.
    names = {field.name for field in dataclasses.fields(Grid)} & values.keys()
    given = {k: tuple(v) if isinstance(v := values[k], list) else v for k in names}
    try:
        return Grid(**given, data_dir=data_dir)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{folder} has no grid that can be read: {error}") from error


def _candidates(
    comparison: Comparison, every_candidate: bool
) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """Yields names and keys of runs, in the order of the table."""
    rows = rows_of(comparison)
    for row in rows:
        for candidate in row.candidates:
            is_chosen = row.best is not None and candidate.values == row.best.values
            if candidate.diverged or not (every_candidate or is_chosen):
                continue
            # The networks that are reported: of fresh seeds, if there are any.
            shown = row.best if row.best and not every_candidate else candidate
            yield (
                _name(row, rows, candidate.values, every_candidate),
                [result.key for result in shown.results],
            )


def _name(row: Row, rows: Sequence[Row], values: dict[str, float], every_candidate: bool) -> str:
    shown = row.swept if every_candidate else [name for name in ("rho",) if name in values]
    return ", ".join([row_name(row, rows), *(f"{name} {values[name]:g}" for name in shown)])


def _sample(feeds: Sequence[Feed], count: int) -> Sample:
    """Returns the first examples. Their images are the same for all feeds."""
    images, _ = _first(feeds[0], count)
    return Sample(images, np.stack([_first(feed, count)[1] for feed in feeds]))


def _first(feed: Feed, count: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels, counted = next(feed.batches(count))
    return np.asarray(images)[counted], np.asarray(labels)[counted]
