"""The course of a comparison: the runs of a grid, many at once."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import capacity, data, progress, results, train
from experiments.checkpoints import Checkpoints
from experiments.config import Config
from experiments.experiment import Experiment, load
from experiments.interruption import Interruption
from experiments.methods import STRUCTURAL
from experiments.replicas import Labels, Replicas
from experiments.results import DIVERGED, FINISHED, Comparison, Result
from experiments.run import NonFiniteLossError
from experiments.sweep import gradients_of, label_of

SECONDS_BETWEEN_SAVES = 60
SECONDS_TO_TIME_RUNS_ALONE = 20


class Examples(NamedTuple):
    """The data set of a seed, each seed's labels if it is in memory, and a run's steps."""

    dataset: data.Dataset
    labels: dict[int, Labels]
    steps_per_epoch: int


def examples_of(runs: Sequence[Config]) -> Examples:
    """Those that runs of one task are trained on.

    Raises:
        ArgumentError: if the task does not fit them.
        DatasetError: if the data set is not there.
    """
    dataset = load(runs[0])
    experiment = Experiment(runs[0], dataset)
    labels: dict[int, Labels] = {}
    for seed, run in {run.seed: run for run in runs}.items():
        noisy = run.label_noise > 0 and seed != runs[0].seed
        train, validation, *_ = load(run) if noisy else dataset
        if isinstance(train, data.Stream) or isinstance(validation, data.Stream):
            break
        labels[seed] = Labels(train.labels, validation.labels)
    return Examples(dataset, labels, experiment.steps_per_epoch)


class Speed(NamedTuple):
    """Seconds that some runs take.

    Attributes:
        runs: how many they are.
        together: as they were trained, compilation included.
        by_training: one after another, by experiments.train.
        steps_alone: one after another, with programs that are compiled and nothing to write.
    """

    runs: int
    together: float
    by_training: float
    steps_alone: float


class SweepRun:
    """Trains those runs of a grid that have no result yet.

    Args:
        runs: resolved configurations; those that can share a program are neighbours.
        examples: as :func:`examples_of` loads them.
        comparison: the results that are there; more are added.
        folder: where results are written, and checkpoints of the runs under way.
        replicas_at_once: at most so many, or None for as many as is fast and fits.
        interruption: asked after every epoch.

    Attributes:
        missing: how many runs have no result yet.
    """

    def __init__(
        self,
        runs: Sequence[Config],
        examples: Examples,
        comparison: Comparison,
        folder: Path,
        replicas_at_once: int | None,
        interruption: Interruption,
    ) -> None:
        self._comparison, self._folder = comparison, folder
        self._limit, self._interruption = replicas_at_once, interruption
        done = {result.key for result in comparison.results}
        self._missing = {run for run in runs if results.key_of(run) not in done}
        self.missing = len(self._missing)
        # Whole groups: a part of one that was stopped is found again if all parts are as before.
        groups = [list(group) for _, group in itertools.groupby(runs, _program_of)]
        self._groups = [group for group in groups if self._missing.intersection(group)]
        self._dataset, self._labels, _ = examples
        self._restored = False

    def train(self) -> Speed | None:
        """Trains all; returns how fast, where runs were trained at once.

        Raises:
            ArgumentError: if the replicas do not fit in memory.
            CheckpointError: if a checkpoint of runs under way cannot be read.
            KeyboardInterrupt: after a signal, once everything is saved.
        """
        begun = time.perf_counter()
        total = sum(run.epochs or 0 for run in self._missing)
        with progress.shown(total, "epoch") as bar:
            ways = [self._train_group(group, bar) for group in self._groups]
        shutil.rmtree(self._folder / "under-way", ignore_errors=True)
        together = time.perf_counter() - begun
        return self._speed(together) if ways and all(ways) and not self._restored else None

    def _train_group(self, group: list[Config], bar: progress.Bar) -> bool:
        """Trains runs that share a program; whether several of them at once."""
        label = label_of(group[0].method, group[0].perturbation)
        if isinstance(self._dataset.train, data.Stream):
            for run in group:
                if run in self._missing:
                    self._add([_trained_alone(run, self._folder / "runs")])
                    bar.advance(run.epochs or 0)
                if self._interruption.signal is not None:
                    raise KeyboardInterrupt
            return False
        runs, begun = len(self._missing.intersection(group)), time.perf_counter()
        experiment = Experiment(group[0], self._dataset)
        program = capacity.program(experiment, len(group), self._limit)
        progress.write(
            f"{label}, {group[0].epochs} epochs: {runs} runs, {program.count} at once, "
            f"compiled in {time.perf_counter() - begun:.1f} s"
        )
        for first in range(0, len(group), program.count):
            whole = group[first : first + program.count]
            if part := [run for run in whole if run in self._missing]:
                self._add(self._train_part(experiment, program, part, bar))
        return program.at_once

    def _train_part(
        self, experiment: Experiment, program: Replicas, part: list[Config], bar: progress.Bar
    ) -> list[Result]:
        """Trains as many runs as the program is for, or fewer, from their last checkpoint."""
        inputs = program.inputs(part, self._labels)
        population = program.first(inputs)
        history: list[list[list[float]]] = []  # of each epoch: loss, accuracy, validation loss
        seconds: list[float] = []
        checkpoints = Checkpoints(self._folder / "under-way" / _name_of(part, program.count), 1)
        if saved := checkpoints.steps():
            population, so_far = checkpoints.restore(saved[-1], population)
            history, seconds = so_far["history"], so_far["seconds"]
            self._restored = True
            bar.advance(len(history) * len(part))
        saved_at = time.perf_counter()
        for number in range(len(history), part[0].epochs or 0):
            begun = time.perf_counter()
            population, epoch = program.epoch(population, inputs, number)
            seconds.append(time.perf_counter() - begun)
            history.append([values.tolist() for values in epoch])
            bar.advance(len(part))
            stopping = self._interruption.signal is not None
            if stopping or time.perf_counter() - saved_at > SECONDS_BETWEEN_SAVES:
                so_far = {"history": list(history), "seconds": list(seconds)}
                checkpoints.save(number + 1, population, so_far)
                saved_at = time.perf_counter()
            if stopping:
                checkpoints.close()
                raise KeyboardInterrupt
        checkpoints.close()
        # The first epoch compiles what is small.
        epoch_seconds = statistics.median(seconds[1:] or seconds) / program.count
        milliseconds = 1000 * epoch_seconds / experiment.steps_per_epoch
        steps = experiment.total_steps
        tests = program.test(population)
        curves = np.moveaxis(np.asarray(history), -1, 0)
        return [
            _result(run, steps, curve, test, milliseconds, program.count)
            for run, curve, test in zip(part, curves, tests, strict=False)
        ]

    def _add(self, new: list[Result]) -> None:
        self._comparison.results += new
        self._comparison.origins[0]["finished"] = len(self._comparison.results)
        results.write(self._folder, self._comparison)

    def _speed(self, together: float) -> Speed | None:
        """Times one run of each group alone, unless that takes long."""
        kinds = {(result.method, result.epochs): result for result in self._comparison.results}
        alone = sum(kind.milliseconds_per_step * kind.steps / 1000 for kind in kinds.values())
        if alone > SECONDS_TO_TIME_RUNS_ALONE:
            return None
        by_training = steps_alone = 0.0
        finished = {r.key for r in self._comparison.results if r.status == FINISHED}
        for group in self._groups:
            new = [run for run in group if run in self._missing]
            able = [run for run in new if results.key_of(run) in finished]
            if not able:
                return None
            program = Replicas(Experiment(able[0], self._dataset), 1, at_once=False)
            epochs = len(new) * (group[0].epochs or 0)
            steps_alone += epochs * capacity.seconds_per_epoch(program)
            by_training += len(new) * _seconds_of_training(able[0])
            if self._interruption.signal is not None:
                raise KeyboardInterrupt
        return Speed(self.missing, together, by_training, steps_alone)


def _seconds_of_training(run: Config) -> float:
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence:
        begun = time.perf_counter()
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            summary = train.train(dataclasses.replace(run, output=Path(folder) / "run"))
        if summary["status"] != "finished":
            raise KeyboardInterrupt
        return time.perf_counter() - begun


def _program_of(run: Config) -> tuple:
    """What two runs must have in common to be replicas of each other."""
    structural = tuple(getattr(run, name) for name in STRUCTURAL)
    return (run.method, run.perturbation, run.epochs, *structural)


def _name_of(part: list[Config], count: int) -> str:
    keys = repr(([results.key_of(run) for run in part], count))
    return hashlib.blake2b(keys.encode(), digest_size=8).hexdigest()


def _result(
    run: Config,
    steps: int,
    curve: np.ndarray,
    test_accuracy: float,
    milliseconds_per_step: float,
    runs_at_once: int,
) -> Result:
    """Of a run's history, float64[epochs, 3]."""
    accuracies = curve[:, 1]
    finished = bool(np.isfinite(curve).all())
    # Among equals the last.
    best = len(accuracies) - 1 - int(np.argmax(accuracies[::-1])) if finished else -1
    names = ("loss", "validation_accuracy", "validation_loss")
    return Result(
        method=label_of(run.method, run.perturbation),
        epochs=run.epochs or 0,
        seed=run.seed,
        values=results.values_of(run),
        gradients=gradients_of(run, steps),
        steps=steps,
        status=FINISHED if finished else DIVERGED,
        validation_accuracy=float(accuracies[best]) if finished else None,
        checkpoint_epoch=best + 1 if finished else None,
        test_accuracy=float(test_accuracy) if finished else None,
        milliseconds_per_step=milliseconds_per_step,
        runs_at_once=runs_at_once,
        curve=[
            dict(zip(names, row, strict=True), epoch=number + 1)
            for number, row in enumerate(curve.tolist())
        ],
    )


def _trained_alone(run: Config, folder: Path) -> Result:
    """For data that are streamed: a run of experiments.train, with a folder of its own."""
    name = f"{label_of(run.method, run.perturbation)}-{_name_of([run], 1)}-seed{run.seed}"
    output = folder / name
    there = (output / "config.json").exists()
    # The cores of a CPU are not devices that share a batch.
    devices = 1 if jax.default_backend() == "cpu" else None
    config = dataclasses.replace(run, output=output, devices=devices)
    with contextlib.suppress(NonFiniteLossError):
        summary = train.train(
            train.load_config(output) if there else config, output if there else None
        )
        if summary["status"] != "finished":
            raise KeyboardInterrupt
    (comparison,) = results.read(output)
    (result,) = comparison.results
    return dataclasses.replace(result, values=results.values_of(run))
