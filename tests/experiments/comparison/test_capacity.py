"""How many replicas are trained at once, of programs that are never compiled."""

import time
import types
from typing import NamedTuple

import jax
import pytest

from experiments.comparison import capacity
from experiments.system import machine
from experiments.system.command_line import ArgumentError

DEVICES = jax.local_device_count()
EXPERIMENT = types.SimpleNamespace(recipe=types.SimpleNamespace(batch_size=32))


class Program(NamedTuple):
    """A program of which every replica takes 1000 bytes."""

    experiment: object
    count: int
    at_once: bool
    devices: list

    @property
    def bytes(self):
        return 1000 * self.count // len(self.devices)


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Memory for as many replicas as it is called with."""

    def of(replicas):
        free = 1000 * replicas / capacity.SHARE_OF_MEMORY
        monkeypatch.setattr(machine, "free_bytes", lambda: free)

    monkeypatch.setattr(capacity, "Replicas", Program)
    of(10**6)
    return of


def test_as_many_as_are_fast():
    many = capacity.program(EXPERIMENT, 64, None)
    assert (many.count, many.at_once) == (capacity.AT_ONCE_ON_CPU * DEVICES, True)
    assert many.devices == jax.local_devices()
    few = capacity.program(EXPERIMENT, 3, None)
    assert (few.count, few.devices) == (3, jax.local_devices()[:3])
    # Parts as equal as possible.
    assert capacity.program(EXPERIMENT, 10, 9).count == 5
    # At most the limit, and as many on each of eight devices.
    assert capacity.program(EXPERIMENT, 9, 9).count == 8
    assert capacity.program(EXPERIMENT, 9, None).count == 16


def test_as_many_as_fit(memory):
    memory(20.5)
    assert capacity.program(EXPERIMENT, 64, None).count == 16
    with pytest.raises(ArgumentError, match=r"--replicas-at-once 64 is too many.*at most 16 fit"):
        capacity.program(EXPERIMENT, 64, 64)
    # Not one on each of eight devices.
    memory(3)
    few = capacity.program(EXPERIMENT, 64, None)
    assert (few.count, len(few.devices)) == (2, 2)
    memory(0.5)
    with pytest.raises(ArgumentError, match=r"--batch-size 32 is too large.*not one fits"):
        capacity.program(EXPERIMENT, 64, None)


@pytest.mark.parametrize("is_faster", [True, False])
def test_elsewhere_the_faster_way_is_taken(is_faster, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    # An epoch of all replicas: the time of a run counts.
    seconds = {False: 1.0, True: 2.9 if is_faster else 3.1}
    monkeypatch.setattr(capacity, "seconds_per_epoch", lambda program: seconds[program.at_once])
    program = capacity.program(EXPERIMENT, 20, None)
    assert program.at_once == is_faster
    assert (program.count == 24) == is_faster
    assert f"{seconds[False] / DEVICES:.2f} s" in capsys.readouterr().out
    assert not capacity.program(EXPERIMENT, 1, None).at_once


def test_the_median_of_epochs_without_the_first(monkeypatch):
    """The first epoch compiles what is small."""
    clock, numbers = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def epoch(population, inputs, number):
        numbers.append(number)
        clock[0] += (9.0, 0.2, 0.4, 0.1, 0.1, 0.3)[len(numbers) - 1]
        return population, None

    program = types.SimpleNamespace(first=lambda inputs: None, example=None, epoch=epoch)
    assert capacity.seconds_per_epoch(program) == pytest.approx(0.2)
    assert numbers == [0] * 6
