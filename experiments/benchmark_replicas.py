"""Times a step of a run alone and among replicas: how many to train at once.

    JAX_NUM_CPU_DEVICES=2 python -m experiments.benchmark_replicas --model mlp

Of the digits for mlp, otherwise of random images of 32x32x3; docs/comparing.md has the result.
"""

import dataclasses
from collections.abc import Sequence

import jax

from experiments import benchmark_loop, capacity, command_line
from experiments.config import ArgumentError, Config, Method, Model
from experiments.experiment import Experiment
from experiments.replicas import Replicas

STEPS_PER_EPOCH = 4


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is timed."""

    model: Model = "mlp"
    """One of experiments.train."""
    method: Method = "bisam-log"
    """One of experiments.train."""
    batch_size: int = 32
    """Examples a step."""
    at_once: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Replicas on each device, by jax.vmap."""

    def __post_init__(self) -> None:
        """Refuses what cannot be timed."""
        if not self.at_once or min(self.at_once) < 1:
            raise ArgumentError(f"--at-once must be at least 1, got {self.at_once}")


def milliseconds(arguments: Arguments) -> dict[str, float]:
    """Of a run's step, evaluation included, by the way that it is trained."""
    model, batch = arguments.model, arguments.batch_size
    random = benchmark_loop.random_images(STEPS_PER_EPOCH * batch)
    dataset = None if model == "mlp" else random
    config = Config(model=model, method=arguments.method, batch_size=batch, devices=1)
    experiment = Experiment(config, dataset)
    devices = jax.local_devices()

    def of(program: Replicas) -> float:
        seconds = capacity.seconds_per_epoch(program) / program.count
        return 1000 * seconds / experiment.steps_per_epoch

    times = {"alone": of(Replicas(experiment, 1, at_once=False))}
    if len(devices) > 1:
        name = f"one on each of {len(devices)} devices"
        times[name] = of(Replicas(experiment, len(devices), at_once=False, devices=devices))
    for count in arguments.at_once:
        name = f"{count} at once on each of {len(devices)}"
        times[name] = of(Replicas(experiment, count * len(devices), devices=devices))
    return times


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = command_line.parse(Arguments, __doc__ or "", args)
    try:
        times = milliseconds(arguments)
    except ArgumentError as error:
        command_line.fail(str(error))
    print(f"{arguments.model}, {arguments.method}, batch {arguments.batch_size}: ms a run's step")
    for name, value in times.items():
        print(f"{name:32}{value:10.3f}{times['alone'] / value:8.2f}x")


if __name__ == "__main__":
    main()
