"""Trains replicas, and measures the strength of perturbations along the way."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.comparison import capacity
from experiments.comparison.grid import Grid
from experiments.comparison.grid_run import Examples, examples_of
from experiments.config.recipe import Recipe
from experiments.measures.strength import Strength, ascended_losses, make_strength
from experiments.measures.trained import over_seeds
from experiments.step.feeds import InMemory
from experiments.system import progress
from experiments.system.command_line import ArgumentError


@dataclasses.dataclass(frozen=True)
class Measured:
    """The strength of one ascended loss at one radius, in one network.

    Attributes:
        method: label of the method that trains the network, and its radius.
        seed: random seed.
        epoch: number of epochs trained; 0 for the initialization.
        ascended: name of the ascended loss.
        rho: radius of the measured perturbation.
        loss_rise: rise of the training loss.
        error_rise: rise of the share of wrong predictions.
        cosine: cosine between the gradients of the ascended loss and of the training loss.
    """

    method: str
    seed: int
    epoch: int
    ascended: str
    rho: float
    loss_rise: float
    error_rise: float
    cosine: float


def measured_along(
    grid: Grid,
    epochs: Sequence[int],
    radii: tuple[float, ...],
    mus: tuple[float, ...],
    alphas: tuple[float, ...],
    batches: int,
) -> list[Measured]:
    """Trains the runs of a grid, and measures all of them after the given epochs.

    Args:
        grid: the runs.
        epochs: when to measure, increasing; 0 is the initialization.
        radii: radii of the measured perturbations.
        mus: see :func:`ascended_losses`.
        alphas: see :func:`ascended_losses`.
        batches: number of batches to measure on.

    Raises:
        ArgumentError: if the data do not fit in memory or have fewer batches, or an epoch is beyond
            the training.
        DatasetError: if the data set is not there.
    """
    examples = examples_of(grid)
    if examples.dataset.train.streamed:
        raise ArgumentError("the data set must fit in memory: this measures whole runs at once")
    first = examples.experiment(grid.recipes[0])
    if batches > first.steps_per_epoch:
        raise ArgumentError(
            f"--batches must be at most the {first.steps_per_epoch} of an epoch, got {batches}"
        )
    if epochs[-1] > first.recipe.epochs:
        raise ArgumentError(
            f"--at must be at most the {first.recipe.epochs} epochs of training, got {epochs[-1]}"
        )
    groups = [list(g) for _, g in itertools.groupby(grid.recipes, lambda r: r.label)]
    found: list[Measured] = []
    with progress.shown(epochs[-1] * len(groups), "epoch") as bar:
        for group in groups:
            found += _measured_group(examples, group, epochs, radii, mus, alphas, batches, bar)
    return found


def _measured_group(
    examples: Examples,
    group: list[Recipe],
    epochs: Sequence[int],
    radii: tuple[float, ...],
    mus: tuple[float, ...],
    alphas: tuple[float, ...],
    batches: int,
    bar: progress.Bar,
) -> list[Measured]:
    experiment = examples.experiment(group[0])
    losses = ascended_losses(group[0].label_smoothing, mus, alphas)
    program = capacity.program(experiment, len(group), None)
    images = np.asarray(cast(InMemory, experiment.train).split.images)
    strength = make_strength(experiment, losses)
    measure = over_seeds(strength, (0, 0, None, 0, None))
    size = group[0].batch_size

    def means(params: Any, stats: Any, labels: np.ndarray) -> Strength:
        parts = [slice(start, start + size) for start in range(0, batches * size, size)]
        found = [
            jax.device_get(measure(params, stats, images[p], labels[:, p], jnp.asarray(radii)))
            for p in parts
        ]
        return jax.tree.map(lambda *x: np.mean(x, axis=0), *found)

    found: list[Measured] = []
    for start in range(0, len(group), program.count):
        part = group[start : start + program.count]
        inputs = program.inputs(part, examples.labels)
        labels = np.asarray(inputs.train_labels)
        population = program.first(inputs)
        for epoch in range(epochs[-1] + 1):
            if epoch in epochs:
                params, stats = jax.device_get((population.state.params, population.state.stats))
                found += _rows(part, epoch, tuple(losses), radii, means(params, stats, labels))
            if epoch < epochs[-1]:
                population, _ = program.epoch(population, inputs, epoch)
                bar.advance(1 if start == 0 else 0)
    return found


def _rows(
    part: list[Recipe], epoch: int, losses: tuple[str, ...], radii: tuple[float, ...], strength: Any
) -> list[Measured]:
    return [
        Measured(
            _name(recipe),
            recipe.seed,
            epoch,
            loss,
            rho,
            float(strength.loss_rise[r, i, j]),
            float(strength.error_rise[r, i, j]),
            float(strength.cosine[r, i]),
        )
        for r, recipe in enumerate(part)
        for i, loss in enumerate(losses)
        for j, rho in enumerate(radii)
        if np.isfinite(strength.loss_rise[r, i, j])
    ]


def _name(recipe: Recipe) -> str:
    rho = recipe.hyperparameters.get("rho")
    return recipe.label if rho is None else f"{recipe.label}, rho {rho:g}"
