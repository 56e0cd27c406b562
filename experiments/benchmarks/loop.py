"""Times what the training loop adds to the bare training step.

    python -m experiments.benchmarks.loop --network mlp

The loop picks the examples and fetches the losses. The bare step is the same jitted step,
augmentation included, called repeatedly on one batch that is ready. They take turns, an epoch each,
with BiSAM (-log) on random images of 32x32x3.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.problems import random_images
from experiments.config.config import Config, ModelName, Place, check_ranges
from experiments.config.hyperparameters import Range
from experiments.config.recipe import resolve
from experiments.run.experiment import experiment_of
from experiments.step.feeds import advance
from experiments.step.layout import layout_of
from experiments.system import command_line

STEPS_PER_EPOCH = 20
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {"crop_padding": 0, "flip": False, "cutout": 0.0},
    "crop, flip, Cutout": {"crop_padding": 4, "flip": True, "cutout": 0.5},
}


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """The command line: what is timed."""

    network: ModelName = "mlp"
    """A model of experiments.train."""
    batch_size: int = 128
    """Examples per step."""
    rounds: int = 20
    """Number of rounds of 20 steps, of which the median is printed."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        check_ranges(self, {"batch_size": Range(2), "rounds": Range(1)})


def seconds_per_step(options: LoopOptions, augmentation: str) -> tuple[float, float]:
    """Returns the seconds per step of the loop, and of the bare step.

    Args:
        options: what is timed.
        augmentation: a key of `AUGMENTATIONS`.
    """
    size = options.batch_size
    config = Config(model=options.network, batch_size=size, **AUGMENTATIONS[augmentation])
    recipe = resolve(config)
    dataset = random_images(STEPS_PER_EPOCH * size)
    experiment = experiment_of(recipe, dataset, layout_of(recipe, Place(devices=1)))
    state = experiment.first_state()
    launch = experiment.train.launch(experiment.step, state, size, recipe.seed, recipe.epochs)
    bare = jax.jit(experiment.step, donate_argnums=0)
    batch = jax.tree.map(lambda x: jnp.asarray(x[:size]), dataset.train)
    states = [jax.tree.map(jnp.copy, state) for _ in range(2)]
    seconds: list[list[float]] = [[], []]
    for number in range(options.rounds + 1):
        start = time.perf_counter()
        states[0], _ = advance(launch, states[0], 0, STEPS_PER_EPOCH, lambda losses: None)
        jax.block_until_ready(states[0])
        between = time.perf_counter()
        for _ in range(STEPS_PER_EPOCH):
            states[1], _ = bare(states[1], batch)
        jax.block_until_ready(states[1])
        if number:  # The first round warms up.
            seconds[0].append((between - start) / STEPS_PER_EPOCH)
            seconds[1].append((time.perf_counter() - between) / STEPS_PER_EPOCH)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    options = command_line.parse(LoopOptions, __doc__ or "", args)
    print(f"{options.network}, batch {options.batch_size}: ms per step")
    print(f"{'augmentation':32}{'bare':>9}{'loop':>9}{'speed of the loop':>20}")
    for name in AUGMENTATIONS:
        loop, bare = seconds_per_step(options, name)
        print(f"{name:32}{1e3 * bare:9.2f}{1e3 * loop:9.2f}{100 * bare / loop:18.1f} %")


if __name__ == "__main__":
    main()
