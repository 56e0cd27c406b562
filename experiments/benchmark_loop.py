"""What the training loop adds to the bare training step.

The loop picks the examples and fetches the losses; the bare step is the same jitted step,
augmentation included, called again and again on one batch that is ready. They take turns, an epoch
each.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data, launches
from experiments.config import Config
from experiments.experiment import Experiment

STEPS_PER_EPOCH = 20
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {"crop_padding": 0, "flip": False, "cutout": 0.0},
    "crop, flip, Cutout": {"crop_padding": 4, "flip": True, "cutout": 0.5},
}


def measure(network: str, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each of `AUGMENTATIONS`, of BiSAM (-log) on random images of 32x32x3.

    Args:
        network: a model's name.
        batch_size: examples a step.
        rounds: of which the median is reported.
    """
    dataset = random_images(STEPS_PER_EPOCH * batch_size)
    rows = []
    for name, options in AUGMENTATIONS.items():
        config = Config(model=network, batch_size=batch_size, devices=1, **options)  # type: ignore[arg-type]
        loop, bare = _seconds_per_step(Experiment(config, dataset), batch_size, rounds)
        rows.append(
            {
                "augmentation": name,
                "loop_milliseconds": 1e3 * loop,
                "bare_milliseconds": 1e3 * bare,
                "speed_of_the_loop": bare / loop,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'augmentation':32}{'bare ms/step':>14}{'loop ms/step':>14}{'speed':>9}"]
    for row in rows:
        lines.append(
            f"{row['augmentation']:32}{row['bare_milliseconds']:14.2f}"
            f"{row['loop_milliseconds']:14.2f}{100 * row['speed_of_the_loop']:7.1f} %"
        )
    return "\n".join(lines)


def _seconds_per_step(experiment: Experiment, batch_size: int, rounds: int) -> tuple[float, float]:
    launch = experiment.compile()
    bare = jax.jit(experiment.step(), donate_argnums=0)
    batch = jax.tree.map(lambda x: x[:batch_size], experiment.dataset.train)
    states = [jax.tree.map(jnp.copy, experiment.state) for _ in range(2)]
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        start = time.perf_counter()
        states[0], _ = launches.run(launch, states[0], 0, STEPS_PER_EPOCH, lambda losses: None)
        jax.block_until_ready(states[0])
        between = time.perf_counter()
        for _ in range(STEPS_PER_EPOCH):
            states[1], _ = bare(states[1], batch)
        jax.block_until_ready(states[1])
        if number:  # The first round warms up.
            seconds[0].append((between - start) / STEPS_PER_EPOCH)
            seconds[1].append((time.perf_counter() - between) / STEPS_PER_EPOCH)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def random_images(examples: int) -> data.Dataset:
    """So many of 32x32x3, in ten classes; the same in all three splits."""
    rng = np.random.default_rng(0)
    split = data.Split(
        rng.integers(0, 256, (examples, 32, 32, 3), np.uint8),
        rng.integers(0, 10, examples, np.int32),
    )
    grey = np.full(3, 127.5, np.float32)
    return data.Dataset(split, split, split, 10, (32, 32, 3), grey, grey, "random")
