"""Kills of training processes, at random times and within saves, of one process and of two."""

import random
import shutil
import time
from collections import Counter

from tests.experiments.run.runs import assert_same_run, saved_steps
from tests.experiments.script import HEARTBEAT_TIMEOUT, start, start_together

# 628 steps with a save every 40: a run is within a save for much of its time.
LONG = [
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--learning-rate",
    "0.001",
    "--checkpoint-every",
    "40",
]
STEPS = 2 * 314


def is_saving(folder):
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any("tmp" in path.name for path in checkpoints.iterdir())


class Kills:
    """Kills one process of a run again and again, and resumes it.

    Args:
        folder: an empty folder for the runs.
        processes: number of processes of the run.
        rng: a `random.Random`.
    """

    def __init__(self, folder, processes, rng):
        self.folder, self.processes, self.rng = folder, processes, rng
        self.whole, self.run = folder / "whole", folder / "run"
        for process in self._started(self.whole):
            _, err = process.communicate(timeout=600)
            assert process.returncode == 0, err

    def __call__(self, count, within_saves):
        """Returns what became of `count` kills: "survived", "lost", "wrong" or "traceback"."""
        verdicts, killed = Counter(), 0
        while killed < count:
            shutil.rmtree(self.run, ignore_errors=True)
            before = killed
            while killed < count and not self._ends():
                verdicts += self._killed(within_saves)
                killed += 1
            verdicts["survived"] += 0
            verdicts += self._finished(killed - before)
        return +verdicts

    def _started(self, run):
        how = ["--resume", run] if (run / "config.json").exists() else [*LONG, "--output", run]
        if self.processes == 1:
            return [start(*how, cwd=self.folder, quick=True)]
        return start_together(*how, cwd=self.folder)

    def _ends(self):
        return bool(saved_steps(self.run)) and saved_steps(self.run)[-1] >= STEPS - 100

    def _killed(self, within_saves):
        """Starts or resumes the run and kills one of its processes."""
        processes = self._started(self.run)
        victim = self.rng.choice(processes)
        deadline = time.monotonic() + self.rng.uniform(0.5, 12)
        while all(process.poll() is None for process in processes):
            if is_saving(self.run) if within_saves else time.monotonic() > deadline:
                break
            time.sleep(0.002)
        victim.kill()
        verdicts = Counter()
        for process in processes:
            _, err = process.communicate(timeout=60 + 10 * HEARTBEAT_TIMEOUT)
            if self.processes == 1 and "Traceback" in err:
                verdicts["traceback"] += 1
        return verdicts

    def _finished(self, kills):
        """Resumes to the end; returns the verdict of all kills before."""
        for process in self._started(self.run):
            _, err = process.communicate(timeout=600)
            if process.returncode:
                print(err)
                return Counter(lost=kills)
        try:
            assert_same_run(self.run, self.whole, STEPS)
        except AssertionError as error:
            print(error)
            return Counter(wrong=kills)
        return Counter(survived=kills)


def attack_by_kills(folder, count, seed):
    """Yields names and verdicts."""
    for processes in (1, 2):
        place = folder / f"processes-{processes}"
        place.mkdir()
        kills = Kills(place, processes, random.Random(seed))
        for within_saves in (False, True):
            when = "within saves" if within_saves else "at random"
            many = "one process" if processes == 1 else "one of two processes"
            yield f"kills {when}, {many}", kills(count, within_saves)
