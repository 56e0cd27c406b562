"""Chooses how many replicas to train at once.

Networks of many replicas consist of matrix products (:mod:`experiments.models.convolution`), which
become batched products of all replicas. Elsewhere than on CPU, a network by itself has the
compiler's convolutions, which may be faster: both ways are timed.
"""

import statistics
import time

import jax

from experiments.comparison.replicas import Replicas
from experiments.run.experiment import Experiment
from experiments.system import machine
from experiments.system.command_line import ArgumentError

# Replicas per device. More gain nothing on CPU, since they do not fit its caches
# (docs/comparing.md).
AT_ONCE_ON_CPU = 4
SHARE_OF_MEMORY = 0.8


def program(experiment: Experiment, runs: int, limit: int | None) -> Replicas:
    """Returns the program that trains several of `runs` replicas at once.

    Args:
        experiment: one of the replicas.
        runs: number of replicas.
        limit: largest number at once; None for as many as is fast and fits in memory.

    Raises:
        ArgumentError: if the limit, or a single replica, does not fit in memory.
    """
    if jax.default_backend() == "cpu":
        return _together(experiment, runs, limit)
    single = _fitting(experiment, min(runs, limit or runs, jax.local_device_count()), limit, False)
    if runs == 1:
        return single
    together = _together(experiment, runs, limit)
    seconds = [seconds_per_epoch(way) / way.count for way in (single, together)]
    print(
        f"an epoch takes {seconds[0]:.2f} s per run with one run per device, {seconds[1]:.2f} s "
        "with many at once"
    )
    return min(zip(seconds, (single, together), strict=True), key=lambda pair: pair[0])[1]


def seconds_per_epoch(program: Replicas) -> float:
    """Returns the median time of an epoch of all replicas, evaluation included."""
    population = program.first(program.example)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 6 and sum(seconds[1:]) < 1):
        begun = time.perf_counter()
        population, _ = program.epoch(population, program.example, 0)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def _together(experiment: Experiment, runs: int, limit: int | None) -> Replicas:
    most = min(runs, limit or runs)
    if limit is None and jax.default_backend() == "cpu":
        most = min(most, AT_ONCE_ON_CPU * jax.local_device_count())
    # Parts are as equal as possible. The last one is filled up.
    parts = -(-runs // most)
    return _fitting(experiment, -(-runs // parts), limit, True)


def _fitting(
    experiment: Experiment,
    count: int,
    limit: int | None,
    at_once: bool,
    most_devices: int | None = None,
) -> Replicas:
    devices = jax.local_devices()[: min(count, most_devices or count)]
    rounded = -(-count // len(devices)) * len(devices)
    if limit is not None and rounded > limit:
        rounded -= len(devices)
    made = Replicas(experiment, rounded, at_once=at_once, devices=devices)
    # The devices of a CPU share its memory.
    shared = len(devices) if jax.default_backend() == "cpu" else 1
    free = SHARE_OF_MEMORY * machine.free_bytes() / shared
    if made.bytes <= free:
        return made
    takes = f"about {made.bytes / 2**30:.2f} GiB on each of {len(devices)} devices"
    there = f"{free / 2**30:.2f} GiB are free"
    fit = int(rounded * free / made.bytes) // len(devices) * len(devices)
    if fit == 0 and len(devices) > 1:
        fewer = len(devices) // 2
        return _fitting(experiment, count if at_once else fewer, limit, at_once, fewer)
    if fit == 0:
        raise ArgumentError(
            f"--batch-size {experiment.recipe.batch_size} is too large: {rounded} runs at once "
            f"take {takes}, {there}, and not one fits; use a smaller --microbatch-size"
        )
    if limit is not None:
        raise ArgumentError(
            f"--replicas-at-once {limit} is too many: {rounded} take {takes}, {there}; at most "
            f"{fit} fit"
        )
    return Replicas(experiment, fit, at_once=at_once, devices=devices)
