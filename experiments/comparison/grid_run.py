"""Trains the runs of a grid, many at once, and keeps the finished results."""

import contextlib
import dataclasses
import hashlib
import itertools
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import data
from experiments.comparison import capacity, networks, results
from experiments.comparison.grid import Grid
from experiments.comparison.reading import read_results
from experiments.comparison.replicas import Labels, Replicas, labels_of
from experiments.comparison.results import FINISHED, Comparison, Result
from experiments.comparison.words import duration
from experiments.config.config import Config, Place
from experiments.config.hyperparameters import STRUCTURAL
from experiments.config.recipe import Recipe, filled_in
from experiments.run.checkpoints import Checkpoints
from experiments.run.ends import NonFiniteLossError
from experiments.run.experiment import Experiment, experiment_of
from experiments.run.folder import read_config
from experiments.run.training import train
from experiments.step.layout import layout_of
from experiments.system import progress
from experiments.system.interruption import Interruption

SECONDS_BETWEEN_SAVES = 60


class Examples(NamedTuple):
    """The examples that the runs of a grid are trained on.

    Attributes:
        dataset: the data set, with the labels of the first seed.
        labels: labels by seed; empty if the data set is streamed.
    """

    dataset: data.Dataset
    labels: dict[int, Labels]

    def experiment(self, recipe: Recipe, *, trained: bool = False) -> Experiment:
        """Returns the experiment of a run, on one device.

        Args:
            recipe: the run.
            trained: whether it is only measured, so that it does not matter how it started.

        Raises:
            ArgumentError: if the recipe does not fit the data.
        """
        layout = layout_of(recipe, Place(devices=1))
        return experiment_of(recipe, self.dataset, layout, {} if trained else None)


def examples_of(grid: Grid) -> Examples:
    """Loads the examples of a grid.

    Raises:
        DatasetError: if the data set is not there.
    """
    first = data.load(grid.source(grid.first_seed))
    if first.train.streamed:
        return Examples(first, {})
    labels = {}
    for seed in (*grid.search_seeds, *grid.fresh_seeds):
        noisy = grid.label_noise > 0 and seed != grid.first_seed
        labels[seed] = labels_of(data.load(grid.source(seed)) if noisy else first)
    return Examples(first, labels)


class GridRun:
    """Trains the runs of a grid that have no result yet.

    Args:
        grid: the options that all runs share.
        recipes: the runs. Runs that can share a program are neighbors.
        examples: what the runs are trained on.
        comparison: the results so far, to which new ones are added.
        folder: where results, and checkpoints of unfinished runs, are written.
        replicas_at_once: largest number of runs at once; None for as many as is fast and fits.
        keep_networks: whether to keep the parameters of every run.
        interruption: asked after every epoch.

    """

    def __init__(
        self,
        grid: Grid,
        recipes: Sequence[Recipe],
        examples: Examples,
        comparison: Comparison,
        folder: Path,
        replicas_at_once: int | None,
        keep_networks: bool,
        interruption: Interruption,
    ) -> None:
        self._grid, self._examples = grid, examples
        self._comparison, self._folder = comparison, folder
        self._limit, self._interruption = replicas_at_once, interruption
        self._keep_networks = keep_networks
        self._steps_per_epoch = examples.dataset.train.examples // grid.recipes[0].batch_size
        self._estimated, self._compile_seconds = False, 0.0
        done = {result.key for result in comparison.results}
        self._missing = {recipe.key for recipe in recipes} - done
        # Whole groups, so that their parts, and the checkpoints of these, are the same as before.
        groups = [list(group) for _, group in itertools.groupby(recipes, _program_of)]
        self._groups = [group for group in groups if self._missing_in(group)]

    def train(self) -> None:
        """Trains all missing runs.

        Raises:
            ArgumentError: if the replicas do not fit in memory.
            CheckpointError: if a checkpoint of unfinished runs cannot be read.
            KeyboardInterrupt: after a signal, once everything is saved.
        """
        runs = [run for group in self._groups for run in self._missing_in(group)]
        total = sum(map(self._gradients, runs))
        with progress.shown(total, "gradient") as bar:
            for group in self._groups:
                if self._examples.dataset.train.streamed:
                    self._train_one_by_one(group, bar)
                else:
                    self._train_together(group, bar)

    def _gradients(self, recipe: Recipe, epochs: int | None = None) -> int:
        """Returns the number of batch gradients of some epochs of a run, or of all."""
        steps = self._steps_per_epoch * recipe.epochs
        share = 1 if epochs is None else epochs / recipe.epochs
        return round(recipe.gradients_per_step(steps) * steps * share)

    def _missing_in(self, group: Sequence[Recipe]) -> list[Recipe]:
        return [recipe for recipe in group if recipe.key in self._missing]

    def _train_one_by_one(self, group: list[Recipe], bar: progress.Bar) -> None:
        for recipe in self._missing_in(group):
            self._add([_trained_alone(self._grid, recipe, self._folder / "runs")])
            bar.advance(self._gradients(recipe))
            if self._interruption.signal is not None:
                raise KeyboardInterrupt

    def _train_together(self, group: list[Recipe], bar: progress.Bar) -> None:
        begun = time.perf_counter()
        experiment = self._examples.experiment(group[0])
        program = capacity.program(experiment, len(group), self._limit)
        self._compile_seconds = time.perf_counter() - begun
        progress.print_line(
            f"{group[0].label}, {group[0].epochs} epochs: {len(self._missing_in(group))} runs, "
            f"{program.count} at once, compiled in {self._compile_seconds:.1f} s"
        )
        for first in range(0, len(group), program.count):
            if part := self._missing_in(group[first : first + program.count]):
                self._add(self._train_part(experiment, program, part, bar))

    def _train_part(
        self, experiment: Experiment, program: Replicas, part: list[Recipe], bar: progress.Bar
    ) -> list[Result]:
        """Trains at most `program.count` runs, from their last checkpoint."""
        inputs = program.inputs(part, self._examples.labels)
        population = program.first(inputs)
        history: list[list[list[float]]] = []  # per epoch: loss, accuracy, validation loss
        seconds: list[float] = []
        name = _name_of(part, program.count)
        checkpoints = Checkpoints(self._folder / "under-way" / name, 1)
        if saved := checkpoints.steps():
            population, so_far = checkpoints.restore(saved[-1], population)
            history, seconds = so_far["history"], so_far["seconds"]
            bar.advance(len(part) * self._gradients(part[0], len(history)))
        saved_at = time.perf_counter()
        for number in range(len(history), part[0].epochs):
            begun = time.perf_counter()
            population, epoch = program.epoch(population, inputs, number)
            seconds.append(time.perf_counter() - begun)
            history.append([values.tolist() for values in epoch])
            bar.advance(len(part) * self._gradients(part[0], 1))
            if len(seconds) == 2:  # the first epoch includes the compilation of small programs
                self._estimate(part, seconds[1], seconds[0] - seconds[1])
            stopping = self._interruption.signal is not None
            if stopping or time.perf_counter() - saved_at > SECONDS_BETWEEN_SAVES:
                so_far = {"history": list(history), "seconds": list(seconds)}
                checkpoints.save(number + 1, population, so_far)
                saved_at = time.perf_counter()
            if stopping:
                checkpoints.close()
                raise KeyboardInterrupt
        checkpoints.close()
        # The first epoch includes the compilation of small programs.
        epoch_seconds = statistics.median(seconds[1:] or seconds) / program.count
        milliseconds = 1000 * epoch_seconds / experiment.steps_per_epoch
        steps = experiment.total_steps
        tests = program.test(population)
        if self._keep_networks:
            networks.keep(self._folder, name, part, population)
        curves = np.moveaxis(np.asarray(history), -1, 0)
        return [
            _result(run, steps, curve, test, milliseconds, program.count)
            for run, curve, test in zip(part, curves, tests, strict=False)
        ]

    def _estimate(self, part: list[Recipe], seconds: float, compiling: float) -> None:
        """Says once how long all runs will take, from one epoch of the first ones."""
        if not self._estimated:
            self._estimated = True
            total = sum(self._gradients(run) for g in self._groups for run in self._missing_in(g))
            left = total / (len(part) * self._gradients(part[0], 1)) * seconds
            left += len(self._groups) * (self._compile_seconds + max(0, compiling))
            progress.print_line(f"these runs take about {duration(left)}")

    def _add(self, new: list[Result]) -> None:
        confirmed = self._grid.fresh_seeds
        self._comparison.results += [
            dataclasses.replace(result, confirms=result.seed in confirmed) for result in new
        ]
        self._comparison.origins[0]["finished"] = len(self._comparison.results)
        results.write_results(self._folder, self._comparison)


def forget_unfinished(folder: Path) -> None:
    """Removes the checkpoints of runs under way."""
    shutil.rmtree(folder / "under-way", ignore_errors=True)


def _program_of(recipe: Recipe) -> tuple:
    """Returns what two runs must have in common to be replicas of each other."""
    structural = tuple(recipe.hyperparameters.get(name) for name in STRUCTURAL)
    return (recipe.label, recipe.epochs, *structural)


def _name_of(part: list[Recipe], count: int) -> str:
    keys = repr(([recipe.key for recipe in part], count))
    return hashlib.blake2b(keys.encode(), digest_size=8).hexdigest()


def _result(
    recipe: Recipe, steps: int, history: np.ndarray, tests: Sequence[float], *cost: Any
) -> Result:
    """Returns the result of a run.

    Args:
        recipe: what was trained.
        steps: number of steps.
        history: loss, validation accuracy and validation loss, float64[epochs, 3].
        tests: test accuracies of the best and of the last epoch.
        *cost: see :func:`result_of`.
    """
    best = None
    if np.isfinite(history).all():
        accuracies = history[:, 1]
        # The last one if several are equal.
        epoch = len(accuracies) - int(np.argmax(accuracies[::-1]))
        of_best, of_last = map(float, tests)
        best = (float(accuracies[epoch - 1]), epoch, of_best, of_last)
    names = ("loss", "validation_accuracy", "validation_loss")
    curve = [
        dict(zip(names, row, strict=True), epoch=number)
        for number, row in enumerate(history.tolist(), 1)
    ]
    return results.result_of(recipe, steps, curve, best, *cost)


def _trained_alone(grid: Grid, recipe: Recipe, folder: Path) -> Result:
    """Trains one run on streamed data, in its own run folder."""
    output = folder / f"{recipe.label}-{_name_of([recipe], 1)}-seed{recipe.seed}"
    resumes = (output / "config.json").exists()
    config = read_config(output) if resumes else _config_of(grid, recipe, output)
    with contextlib.suppress(NonFiniteLossError):
        summary = train(config, output if resumes else None)
        if summary["status"] != FINISHED:
            raise KeyboardInterrupt
    (comparison,) = read_results(output)
    (result,) = comparison.results
    return result


def _config_of(grid: Grid, recipe: Recipe, output: Path) -> Config:
    return dataclasses.replace(
        filled_in(Config(), recipe),
        train_examples=grid.train_examples,
        image_size=grid.image_size,
        data_dir=grid.data_dir,
        workers=grid.workers,
        output=output,
        # The cores of a CPU are not devices that share a batch.
        devices=1 if jax.default_backend() == "cpu" else None,
    )
