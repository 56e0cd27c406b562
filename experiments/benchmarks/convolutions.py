"""Times a step of BiSAM of convolutional networks: as XLA convolves, as products, and in PyTorch.

    python -m experiments.benchmarks.convolutions

The programs take turns, step by step, so that a change in the speed of the machine affects all of
them. PyTorch is timed if it is installed (`pip install torch`): same network, batch and step,
channels last. On a machine with an accelerator the first two are the same program.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments import models
from experiments.benchmarks.problems import compilers_convolutions, random_images
from experiments.config.config import Config, Place, check_ranges
from experiments.config.hyperparameters import Range
from experiments.config.recipe import resolve
from experiments.run.experiment import experiment_of
from experiments.step.layout import layout_of
from experiments.system import command_line, exhaustion, machine
from experiments.system.command_line import ArgumentError

WITH_TORCH = ("resnet20", "resnet56", "wrn28_2", "vgg19_bn")


@dataclasses.dataclass(frozen=True)
class ConvolutionsOptions:
    """The command line: what to time."""

    networks: tuple[str, ...] = WITH_TORCH
    """Networks of experiments.train. PyTorch has the default ones."""
    batch_size: int = 128
    """Examples per step."""
    steps: int = 5
    """Number of timed steps of each program."""
    native: bool = True
    """Also time XLA's own convolutions, of which a step may take a minute."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        check_ranges(self, {"batch_size": Range(2), "steps": Range(1)})
        for name in self.networks:
            if name not in models.ARCHITECTURES:
                raise ArgumentError(
                    f"--networks has no {name!r}: use {', '.join(models.ARCHITECTURES)}"
                )


def jitted_step(network: str, batch_size: int, native: bool) -> tuple[Callable[[], Any], int]:
    """Returns a compiled step of BiSAM, which is called without arguments.

    Args:
        network: a key of `models.ARCHITECTURES`.
        batch_size: number of random 32x32x3 images.
        native: whether XLA convolves by itself.

    Returns:
        The step, and the number of parameters.
    """
    config = Config(dataset="cifar10", model=network, method="bisam-log", batch_size=batch_size)
    recipe = dataclasses.replace(resolve(config), crop_padding=0, flip=False)
    with compilers_convolutions() if native else contextlib.nullcontext():
        layout = layout_of(recipe, Place(devices=1))
        experiment = experiment_of(recipe, random_images(batch_size), layout)
        state = experiment.first_state()
        # One step per launch: in a loop, XLA's own convolutions are slower yet.
        launch = experiment.train.launch(experiment.step, state, batch_size, 0, recipe.epochs)
    kept, number = [state], itertools.count()

    def step() -> None:
        now = next(number)
        kept[0], losses = launch.run(kept[0], now, now + 1)
        jax.block_until_ready((kept[0], losses))

    return step, sum(x.size for x in jax.tree.leaves(state.params))


def in_torch(network: str, batch_size: int) -> tuple[Callable[[], Any], int]:
    """Returns the same in PyTorch."""
    from experiments.benchmarks import torch_steps

    split: Any = random_images(batch_size).train
    images = (split.images / 127.5 - 1).astype(np.float32)
    return torch_steps.torch_step(network, images, split.labels)


def step_times(options: ConvolutionsOptions, network: str) -> dict[str, float]:
    """Returns the median time of a step of each program, in ms; NaN if it is not timed."""
    has_torch = importlib.util.find_spec("torch") is not None
    made = {"products": jitted_step(network, options.batch_size, native=False)}
    if options.native:
        made["XLA's"] = jitted_step(network, options.batch_size, native=True)
    if has_torch and network in WITH_TORCH:
        made["PyTorch"] = in_torch(network, options.batch_size)
    assert len({parameters for _, parameters in made.values()}) == 1, made
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(1 + options.steps):
        for name, (step, _) in made.items():
            begun = time.perf_counter()
            step()
            if number:  # the first compiles what is small
                seconds[name].append(time.perf_counter() - begun)
    nothing = dict.fromkeys(("XLA's", "products", "PyTorch"), math.nan)
    return nothing | {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    options = command_line.parse(ConvolutionsOptions, __doc__ or "", args)
    known = {**machine.versions(), **machine.hardware()}
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    print(f"BiSAM, batch {options.batch_size}: median ms per step")
    print(
        f"{'network':12}{'XLA':>10}{'products':>10}{'PyTorch':>10}{'XLA/ours':>10}{'ours/PyTorch':>14}"
    )
    for network in options.networks:
        times = step_times(options, network)
        native, ours, torch = times["XLA's"], times["products"], times["PyTorch"]
        print(
            f"{network:12}{native:10.0f}{ours:10.0f}{torch:10.0f}{native / ours:10.1f}"
            f"{ours / torch:14.2f}",
            flush=True,
        )


if __name__ == "__main__":
    exhaustion.run(main)
