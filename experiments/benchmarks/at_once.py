"""Times a step of one run, and of many replicas, to find how many to train at once.

    JAX_NUM_CPU_DEVICES=2 python -m experiments.benchmarks.at_once --model mlp

uses the digits for mlp, and random 32x32x3 images for other models. The result is in
docs/comparing.md.
"""

import dataclasses
from collections.abc import Sequence

import jax

from experiments import data
from experiments.benchmarks.problems import random_images
from experiments.comparison import capacity
from experiments.comparison.replicas import Replicas
from experiments.config.config import Config, MethodName, Place, check_ranges
from experiments.config.hyperparameters import Range
from experiments.config.recipe import resolve
from experiments.run.experiment import experiment_of
from experiments.step.layout import layout_of
from experiments.system import command_line, exhaustion
from experiments.system.command_line import ArgumentError

STEPS_PER_EPOCH = 4


@dataclasses.dataclass(frozen=True)
class AtOnceOptions:
    """The command line: what to time."""

    model: str = "mlp"
    """A model of experiments.train."""
    method: MethodName = "bisam-log"
    """A method of experiments.train."""
    batch_size: int = 32
    """Examples per step."""
    at_once: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of replicas to try on each device, by jax.vmap."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        check_ranges(self, {"batch_size": Range(2)})
        if not self.at_once or min(self.at_once) < 1:
            raise ArgumentError(f"--at-once must be at least 1, got {self.at_once}")


def milliseconds(options: AtOnceOptions) -> dict[str, float]:
    """Returns milliseconds per step and run, evaluation included, for each way to train."""
    config = Config(model=options.model, method=options.method, batch_size=options.batch_size)
    recipe = resolve(config)
    digits = options.model == "mlp"
    dataset = (
        data.load(config.source(recipe.seed))
        if digits
        else random_images(STEPS_PER_EPOCH * options.batch_size)
    )
    experiment = experiment_of(recipe, dataset, layout_of(recipe, Place(devices=1)))
    devices = jax.local_devices()

    def of(program: Replicas) -> float:
        seconds = capacity.seconds_per_epoch(program) / program.count
        return 1000 * seconds / experiment.steps_per_epoch

    times = {"by itself": of(Replicas(experiment, 1, at_once=False))}
    if len(devices) > 1:
        name = f"one on each of {len(devices)} devices"
        times[name] = of(Replicas(experiment, len(devices), at_once=False, devices=devices))
    for count in options.at_once:
        name = f"{count} at once on each of {len(devices)}"
        times[name] = of(Replicas(experiment, count * len(devices), devices=devices))
    return times


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    options = command_line.parse(AtOnceOptions, __doc__ or "", args)
    try:
        times = milliseconds(options)
    except ArgumentError as error:
        command_line.fail(str(error))
    print(f"{options.model}, {options.method}, batch {options.batch_size}: ms per step and run")
    for name, value in times.items():
        print(f"{name:32}{value:10.3f}{times['by itself'] / value:8.2f}x")


if __name__ == "__main__":
    exhaustion.run(main)
