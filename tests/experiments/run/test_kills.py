"""Training processes that are terminated and killed, and resumed."""

import signal
import time

import pytest

from tests.attacks.kills import is_saving
from tests.experiments.run.runs import assert_same_run, saved_steps
from tests.experiments.script import start

pytestmark = [pytest.mark.processes, pytest.mark.slow]

# 628 steps with a save every 40: most of the time, a run is within an epoch and within a save.
LONG = ["--epochs", "2", "--batch-size", "4", "--learning-rate", "0.01", "--checkpoint-every", "40"]
LONG += ["--method", "efficient"]
STEPS = 2 * 314


def kill(process, folder, when):
    """Kills the run in a save, as soon as `when` is true; until then the run must not end."""
    deadline = time.monotonic() + 300
    while not (when() and is_saving(folder)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)  # a save takes longer
    process.kill()
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_ends_as_one_that_was_never_killed(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    uninterrupted = start(*LONG, "--output", whole, cwd=tmp_path)

    # It is killed within an epoch and within a save.
    for attempt in range(5):
        last = saved_steps(stopped)[-1] if attempt else 0
        how = ["--resume", stopped] if attempt else [*LONG, "--output", stopped]
        process = start(*how, cwd=tmp_path)
        kill(process, stopped, lambda last=last: max(saved_steps(stopped), default=0) > last)
        if is_saving(stopped):
            break
    assert is_saving(stopped)
    assert saved_steps(stopped)[-1] < STEPS

    process = start("--resume", stopped, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "resuming from step" in out
    _, err = uninterrupted.communicate(timeout=300)
    assert uninterrupted.returncode == 0, err
    assert_same_run(stopped, whole, STEPS)
