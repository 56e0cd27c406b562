"""What is compared: a grid of runs that differ in method, hyperparameters and seed."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from experiments import methods
from experiments.config import (
    HYPERPARAMETERS,
    OF_PERTURBATIONS,
    ArgumentError,
    Config,
    SeveralHyperparameters,
    Task,
)
from experiments.methods import METHODS, STRUCTURAL

TASK = tuple(field.name for field in dataclasses.fields(Task))


@dataclasses.dataclass(frozen=True)
class Sweep(SeveralHyperparameters, Task):
    """Every method with every value of its own hyperparameters, from every seed."""

    methods: tuple[str, ...] = ("sgd", "sam", "bisam-log", "bisam-tanh")
    """Those of experiments.train; METHOD+log and METHOD+tanh ascend BiSAM's losses."""
    seeds: int = 8
    """So many runs each: a seed fixes initialisation, order of the examples, augmentation and
    label noise for all methods."""
    first_seed: int = 0
    """The seeds are this one and those after it; others confirm what was chosen with these."""
    equal_gradients: bool = True
    """Train sgd also for as many epochs as take the gradients that each other method takes."""

    def __post_init__(self) -> None:
        """Refuses what cannot be compared, by the names of the command line."""
        if self.seeds < 1:
            raise ArgumentError(f"--seeds must be at least 1, got {self.seeds}")
        if self.first_seed < 0:
            raise ArgumentError(f"--first-seed must be at least 0, got {self.first_seed}")
        if not self.methods:
            raise ArgumentError("--methods must name at least one method")
        labels = [label_of(*method_of(name)) for name in self.methods]
        _check_once("--methods", labels)
        for name in HYPERPARAMETERS:
            values = getattr(self, name)
            if values is None:
                continue
            option = f"--{name.replace('_', '-')}"
            if not values:
                raise ArgumentError(f"{option} must have at least one value")
            _check_once(option, values)
            taken = {known for method in self.methods for known in self._names_of(method)}
            if name not in taken:
                raise ArgumentError(
                    f"{option} has no meaning for any of --methods {' '.join(self.methods)}"
                )
        self.configs()  # which refuses impossible values

    def configs(self) -> list[Config]:
        """All runs that are asked for, resolved; those that can share a program are neighbours."""
        return [run for name in self.methods for run in self._runs_of(name)]

    def longer_plain(self, runs: Sequence[Config], steps_per_epoch: int) -> list[Config]:
        """Plain training for as many epochs as take the gradients of each of `runs`."""
        plain = [run for run in runs if METHODS[run.method].is_plain]
        if not (plain and self.equal_gradients):
            return []
        epochs = plain[0].epochs or 0
        multiples = {gradients_of(run, steps_per_epoch * epochs) for run in runs}
        longer = sorted({round(epochs * multiple) for multiple in multiples} - {epochs})
        return [dataclasses.replace(run, epochs=epochs) for epochs in longer for run in plain]

    def _runs_of(self, name: str) -> list[Config]:
        swept = {known: getattr(self, known) for known in self._names_of(name)}
        swept = {known: values for known, values in swept.items() if values is not None}
        # What changes the program changes last.
        names = sorted(swept, key=lambda known: known not in STRUCTURAL)
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        grid = itertools.product(*(swept[known] for known in names), seeds)
        return [
            self._config(name, seed, dict(zip(names, values, strict=True)))
            for *values, seed in grid
        ]

    def _names_of(self, name: str) -> list[str]:
        """The hyperparameters of a method."""
        config = self._config(name, 0, {})
        return [known for known in HYPERPARAMETERS if getattr(config, known) is not None]

    def _config(self, name: str, seed: int, values: dict[str, Any]) -> Config:
        method, perturbation = method_of(name)
        task: dict[str, Any] = {known: getattr(self, known) for known in TASK}
        if METHODS[method].is_plain:
            task |= OF_PERTURBATIONS
        return Config(
            **task, **values, method=method, perturbation=perturbation, seed=seed, devices=1
        ).resolved()


def method_of(name: str) -> tuple[Any, Any]:
    """The method and the ascended loss of "METHOD" or "METHOD+PERTURBATION"; None is its own.

    Raises:
        ArgumentError: if there is no such method.
    """
    method, _, perturbation = name.partition("+")
    spec = METHODS.get(method)
    fixed = spec is not None and (spec.is_plain or spec.ascends is not None)
    if spec is None or (perturbation and fixed) or perturbation not in ("", "log", "tanh"):
        raise ArgumentError(
            f"--methods has no {name!r}: use {', '.join(METHODS)}, and METHOD+log or "
            "METHOD+tanh for what is not sgd or bisam-*"
        )
    return method, perturbation or None


def label_of(method: str, perturbation: str | None) -> str:
    """The name of a method with its ascended loss; two names of one method have one label."""
    if perturbation in (None, "ce") or METHODS[method].ascends is not None:
        return method
    for name, spec in METHODS.items():
        if (spec.is_case_of, spec.ascends) == (method, perturbation):
            return name
    return f"{method}+{perturbation}"


def gradients_of(run: Config, steps: int) -> float:
    """The gradients per step of a resolved run, on average over its `steps`."""
    values = {name: getattr(run, name) for name in HYPERPARAMETERS}
    gradients = methods.gradients(run.method, run.perturbation or "ce", values)
    perturbed = len(range(run.start_step, steps, run.every))
    return gradients if perturbed == steps else 1 + (gradients - 1) * perturbed / steps


def _check_once(option: str, values: Iterable[Any]) -> None:
    for value, count in collections.Counter(values).items():
        if count > 1:
            raise ArgumentError(f"{option} has {value} twice")
