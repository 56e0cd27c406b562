"""A grid of runs that differ in method, hyperparameters and seed."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.config.config import Config, SeveralHyperparameters, Task, check_ranges, option_of
from experiments.config.hyperparameters import HYPERPARAMETERS, STRUCTURAL, Range
from experiments.config.methods import METHODS
from experiments.config.recipe import PERTURBATION_OPTIONS, Recipe, resolve
from experiments.step.leaves import PERTURBED
from experiments.system.command_line import ArgumentError, OrDefault
from experiments.system.suggestions import did_you_mean

_OF_A_RUN = ("data_dir", "workers", "epochs")
# Runs that agree in these can be compared.
TASK = tuple(field.name for field in dataclasses.fields(Task) if field.name not in _OF_A_RUN)


@dataclasses.dataclass(frozen=True)
class Grid(SeveralHyperparameters, Task):
    """Every method, with every value of its hyperparameters and every seed."""

    methods: tuple[str, ...] = ("sgd", "sam", "bisam-log", "bisam-tanh")
    """Methods of experiments.train. METHOD+log and METHOD+tanh ascend BiSAM's losses.
    METHOD@group-size=8, METHOD@start-step=1000, METHOD@every=5 and METHOD@perturb=norms are
    methods of their own."""
    seeds: int = 8
    """Number of runs per method and values.
    A seed fixes initialization, example order, augmentation and label noise for all methods."""
    first_seed: int = 0
    """The first seed. The others follow it."""
    trials: OrDefault[int] = None
    """Number of values to try per method: a balanced draw from all combinations (default: all)."""
    confirm: int = 0
    """Number of fresh seeds for the values that each method's validation accuracy chose.
    Only these runs are then tested and reported (default: report the runs that chose)."""
    equal_gradients: bool = True
    """Also train sgd longer, with as many gradients as each other method takes."""

    def __post_init__(self) -> None:
        """Refuses what cannot be compared. Messages name the options."""
        ranges = {
            "seeds": Range(1),
            "first_seed": Range(0),
            "trials": Range(1),
            "confirm": Range(0),
        }
        check_ranges(self, ranges)
        if not self.methods:
            raise ArgumentError("--methods must name at least one method")
        _check_once("--methods", self.labels)
        taken = {name for m in self.methods for name in self._recipe(m, 0, {}).hyperparameters}
        for name in HYPERPARAMETERS:
            values = getattr(self, name)
            if values is None:
                continue
            if not values:
                raise ArgumentError(f"{option_of(name)} must have at least one value")
            _check_once(option_of(name), values)
            if name not in taken:
                raise ArgumentError(
                    f"{option_of(name)} has no meaning for any of --methods "
                    f"{' '.join(self.methods)}"
                )
        _ = self.recipes  # refuses impossible values

    @property
    def labels(self) -> list[str]:
        """The methods by their labels."""
        return [self._recipe(name, 0, {}).label for name in self.methods]

    @property
    def task(self) -> dict[str, Any]:
        """The options that all runs have in common, as JSON values."""
        # Resolved with a method that can follow all options.
        return task_of(self, self._recipe("sam", 0, {}))

    @property
    def search_seeds(self) -> range:
        """The seeds of the runs that choose the values."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def fresh_seeds(self) -> range:
        """The seeds of the runs with the chosen values. No run has chosen with one of them."""
        return range(self.search_seeds.stop, self.search_seeds.stop + self.confirm)

    @functools.cached_property
    def recipes(self) -> list[Recipe]:
        """All runs of the grid. Runs that can share a program are neighbors."""
        return [recipe for name in self.methods for recipe in self._recipes_of(name)]

    def longer_plain(self, recipes: Sequence[Recipe], steps_per_epoch: int) -> list[Recipe]:
        """Returns longer plain runs, with as many gradients as each of `recipes`."""
        plain = [recipe for recipe in recipes if recipe.method_spec.is_plain]
        if not (plain and self.equal_gradients):
            return []
        epochs = plain[0].epochs
        multiples = {recipe.gradients_per_step(steps_per_epoch * epochs) for recipe in recipes}
        longer = sorted({round(epochs * multiple) for multiple in multiples} - {epochs})
        return [dataclasses.replace(recipe, epochs=more) for more in longer for recipe in plain]

    def _recipes_of(self, name: str) -> list[Recipe]:
        known = self._recipe(name, 0, {}).hyperparameters
        swept = {name: getattr(self, name) for name in known if getattr(self, name) is not None}
        # Values that change the program vary slowest.
        names = sorted(swept, key=lambda name: name not in STRUCTURAL)
        grid = self._tried(name, list(itertools.product(*(swept[name] for name in names))))
        return [
            self._recipe(name, seed, dict(zip(names, values, strict=True)))
            for values in grid
            for seed in self.search_seeds
        ]

    def _tried(self, name: str, grid: list[tuple]) -> list[tuple]:
        """Returns the combinations to try, in their order: always the same ones."""
        if self.trials is None:
            return grid
        if self.trials > len(grid):
            raise ArgumentError(
                f"--trials must be at most the {len(grid)} combinations of values of {name}, got "
                f"{self.trials}: give its hyperparameters more values"
            )
        return [grid[number] for number in sorted(_balanced_draw(grid, self.trials))]

    def _recipe(self, name: str, seed: int, values: dict[str, Any]) -> Recipe:
        method, perturbation, options = parsed(name)
        task: Any = {field.name: getattr(self, field.name) for field in dataclasses.fields(Task)}
        named: Any = {"method": method, "perturbation": perturbation}
        try:
            return resolve(Config(**task, **values, **options, **named, seed=seed))
        except ArgumentError as error:
            if not options:
                raise
            raise ArgumentError(f"--methods {name}: {error}") from error


def task_of(asked: Task, recipe: Recipe) -> dict[str, Any]:
    """Returns, as JSON values, what a run shares with all runs it can be compared with."""
    return {name: getattr(recipe, name, getattr(asked, name)) for name in TASK}


def parsed(name: str) -> tuple[str, str | None, dict[str, Any]]:
    """Returns the parts of "METHOD+LOSS@OPTION=VALUE@...": method, ascended loss and options.

    The loss is None if the name gives none.

    Raises:
        ArgumentError: if there is no such method, loss or option.
    """
    base, *settings = name.split("@")
    method, _, perturbation = base.partition("+")
    spec = METHODS.get(method)
    fixed = spec is not None and (not spec.perturbs_weights or spec.ascends is not None)
    if spec is None or (perturbation and fixed) or perturbation not in ("", "log", "tanh"):
        raise ArgumentError(
            f"--methods has no {name!r}: use {', '.join(METHODS)}, and METHOD+log or "
            "METHOD+tanh for every method except sgd, bisam-* and adversarial-*."
            f"{did_you_mean(base, METHODS)}"
        )
    known = {option_of(option)[2:]: option for option in PERTURBATION_OPTIONS}
    options: dict[str, Any] = {}
    for setting in settings:
        option, _, value = setting.partition("=")
        is_number = option != "perturb"
        fits = value.isdecimal() if is_number else value in PERTURBED
        if option not in known or not fits or known[option] in options:
            raise ArgumentError(
                f"--methods has {name!r}: after @ comes each of {', '.join(known)} at most once, "
                f"with a whole number, as in {base}@every=5, or with {' or '.join(PERTURBED)}"
            )
        options[known[option]] = int(value) if is_number else value
    return method, perturbation or None, options


def _balanced_draw(grid: Sequence[tuple], count: int) -> list[int]:
    """Returns the numbers of `count` combinations in which all values are about equally frequent.

    So are the pairs of values, as in an orthogonal array. Plain draws can leave out a value.
    """
    left = np.random.default_rng(0).permutation(len(grid)).tolist()
    seen: collections.Counter = collections.Counter()
    drawn = []
    for _ in range(count):
        rarest = min(left, key=lambda number: sum(seen[part] for part in _parts(grid[number])))
        seen.update(_parts(grid[rarest]))
        left.remove(rarest)
        drawn.append(rarest)
    return drawn


def _parts(values: Sequence[Any]) -> list[tuple]:
    """Returns the single values and the pairs of values of a combination, each with its places."""
    placed = list(enumerate(values))
    return [*itertools.combinations(placed, 1), *itertools.combinations(placed, 2)]


def _check_once(option: str, values: Iterable[Any]) -> None:
    for value, count in collections.Counter(values).items():
        if count > 1:
            raise ArgumentError(f"{option} has {value} twice")
