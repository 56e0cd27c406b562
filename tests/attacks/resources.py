"""Full disks, few descriptors, closed and full outputs, and folders that cannot be written."""

import contextlib
import resource
import subprocess
import sys
from collections import Counter

from tests.experiments.run.runs import rows_of
from tests.experiments.script import ROOT

RUN = ["--epochs", "4", "--train-examples", "320", "--devices", "1", "--checkpoint-every", "5"]
GRID = ["--methods", "sgd", "sam", "--seeds", "2", "--epochs", "2", "--train-examples", "320"]


def command(name, *args, cwd, stdout=subprocess.DEVNULL, limit=None):
    """Returns status and errors of a command in a process of its own."""

    def limited():
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    process = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *map(str, args)],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        preexec_fn=limited if limit else None,
    )
    return process.returncode, process.stderr


def verdict_of(status, err):
    if status == 0:
        return "survived"
    if err.count("\n") == 1 and "Traceback" not in err:
        return "refused"
    print(err[-2000:])
    return "traceback"


@contextlib.contextmanager
def small_disk(place, kilobytes):
    """A file system of this size; needs the right to mount one."""
    place.mkdir(exist_ok=True)
    how = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    subprocess.run(how, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def full_disks(folder, count):
    """Runs and comparisons on disks that become full, then resumed with room."""
    verdicts = Counter()
    whole, grid = folder / "whole", folder / "grid"
    for name, how, output in (("train", RUN, whole), ("compare", GRID, grid)):
        assert command(name, *how, "--output", output, cwd=folder)[0] == 0
    right = {"train": rows_of(whole), "compare": accuracies(grid)}
    for number in range(count):
        name, how = (("train", RUN), ("compare", GRID))[number % 2]
        place = folder / "disk"
        with small_disk(place, int(12 * 1.7**number)):
            output = place / "out"
            verdict = verdict_of(*command(name, *how, "--output", output, cwd=folder))
            subprocess.run(["mount", "-o", "remount,size=99m", str(place)], check=True)
            resumed = ["--resume", output] if name == "train" else [*how, "--output", output]
            if not (output / "config.json").exists() and name == "train":
                resumed = [*how, "--output", place / "again"]
                output = place / "again"
            status, err = command(name, *resumed, cwd=folder)
            if status:
                print(err[-2000:])
                verdict = "lost"
            elif (rows_of if name == "train" else accuracies)(output) != right[name]:
                verdict = "wrong"
        verdicts[verdict] += 1
    return verdicts


def accuracies(folder):
    """The lines of runs.csv without the speed."""
    rows = [line.split(",") for line in (folder / "runs.csv").read_text().splitlines()]
    left_out = rows[0].index("milliseconds_per_step")
    return [row[:left_out] + row[left_out + 1 :] for row in rows]


def few_descriptors(folder, limits):
    """Commands with few file descriptors."""
    verdicts = Counter()
    assert command("train", *RUN, "--output", folder / "run", cwd=folder)[0] == 0
    for limit in limits:
        for name, args in (
            ("train", [*RUN, "--output", folder / f"run-{limit}"]),
            ("compare", [*GRID, "--output", folder / f"grid-{limit}"]),
            ("evaluate", [folder / "run"]),
            ("train", ["--help"]),
        ):
            verdicts[verdict_of(*command(name, *args, cwd=folder, limit=limit))] += 1
    return verdicts


def bad_outputs(folder):
    """Commands whose output is a full device or a pipe that nobody reads."""
    verdicts = Counter()
    assert command("train", *RUN, "--output", folder / "run", cwd=folder)[0] == 0
    for number, open_ in enumerate((_full_device, _closed_pipe)):
        for name, args in (
            ("train", [*RUN, "--output", folder / f"run-{number}"]),
            ("compare", [*GRID, "--output", folder / f"grid-{number}"]),
            ("evaluate", [folder / "run"]),
            ("train", ["--help"]),
            ("compare", ["--help"]),
        ):
            with open_() as stdout:
                result = command(name, *args, cwd=folder, stdout=stdout)
            verdict = verdict_of(*result)
            # What was computed is kept.
            if "--help" not in args and name != "evaluate":
                kept = args[-1] / ("summary.json" if name == "train" else "summary.csv")
                verdict = verdict if kept.exists() else "lost"
            verdicts["wrong" if verdict == "survived" else verdict] += 1
    return verdicts


@contextlib.contextmanager
def _full_device():
    with open("/dev/full", "w") as file:
        yield file


@contextlib.contextmanager
def _closed_pipe():
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    yield reader.stdin
    with contextlib.suppress(BrokenPipeError):
        reader.stdin.close()


def read_only(folder):
    """Commands in a place that cannot be written; needs the right to mount one."""
    verdicts = Counter()
    place = folder / "disk"
    with small_disk(place, 99_000):
        assert command("train", *RUN, "--output", place / "run", cwd=folder)[0] == 0
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        for name, args in (
            ("train", [*RUN, "--output", place / "new"]),
            ("train", RUN),
            ("compare", [*GRID, "--output", place / "new"]),
            ("compare", ["--from", place / "run", "--output", place / "new"]),
            ("evaluate", [place / "run"]),
            ("sharpness", [place / "run", "--output", place / "new"]),
        ):
            verdicts[verdict_of(*command(name, *args, cwd=place))] += 1
    return verdicts
