"""The times of replicas, of programs that are never compiled."""

import re
import types

import jax
import pytest

from experiments.benchmarks import at_once
from experiments.comparison import capacity
from tests.experiments.script import refusal

DEVICES = jax.local_device_count()
NAMES = ["by itself", f"one on each of {DEVICES} devices", f"2 at once on each of {DEVICES}"]


def test_every_way_is_timed(capsys, monkeypatch):
    made = []

    def program(experiment, count, at_once=True, devices=(None,)):
        made.append((experiment.recipe.method, count, at_once, len(devices)))
        return types.SimpleNamespace(count=count)

    monkeypatch.setattr(at_once, "Replicas", program)
    # An epoch is four steps.
    seconds = iter([0.8, 0.8 * DEVICES, 0.8 * DEVICES])
    monkeypatch.setattr(capacity, "seconds_per_epoch", lambda program: next(seconds))
    at_once.main(["--model", "cnn", "--batch-size", "4", "--at-once", "2"])
    assert made == [
        ("bisam-log", 1, False, 1),
        ("bisam-log", DEVICES, False, DEVICES),
        ("bisam-log", 2 * DEVICES, True, DEVICES),
    ]
    out = capsys.readouterr().out
    assert out.startswith("cnn, bisam-log, batch 4: ms per step")
    found = re.findall(r"^(.+?) +(\d+\.\d+) +(\d+\.\d+)x$", out, re.M)
    expected = zip(NAMES, ["200.000", "200.000", "100.000"], ["1.00", "1.00", "2.00"], strict=True)
    assert found == list(expected)


@pytest.mark.slow
@pytest.mark.usefixtures("small_mlp")
def test_the_times_are_measured(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    options = at_once.AtOnceOptions(model="mlp", batch_size=4, at_once=(1,))
    times = at_once.milliseconds(options)
    assert len(times) == 3
    assert min(times.values()) > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--model", "none"], "none"), (["--at-once", "0"], "--at-once must be at least 1, got (0,)")],
    ids=["no model", "no replicas"],
)
def test_bad_input_is_one_line(args, message, capsys):
    assert message in refusal(at_once.main, capsys, *args)
