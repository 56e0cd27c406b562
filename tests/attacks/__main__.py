"""Attacks runs and comparisons, and prints what became of them.

    python -m tests.attacks --kills 25 --damages 300

survived: the result is that of an attack that never came; refused: one line says what is wrong.
Nothing may be lost, wrong or a traceback. It takes about half an hour on two cores.
"""

import argparse
import functools
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import jax

from experiments import compare, train
from tests.attacks import kills, resources
from tests.attacks.damage import damage, outcome, verdict
from tests.experiments import test_damage
from tests.experiments.rows import read_csv

COLUMNS = ("survived", "refused", "lost", "wrong", "traceback")


def report_of(folder):
    """Reports a run or a comparison; returns the outcome and what was read."""
    output = folder.with_name("report")
    shutil.rmtree(output, ignore_errors=True)
    return outcome(compare.main, "--from", folder, "--output", output), lambda: read_csv(
        output / "runs.csv"
    )


READERS = {
    "run": {
        "evaluate": functools.partial(test_damage.read_run, how="evaluate"),
        "resume": functools.partial(test_damage.read_run, how="resume"),
        "report": report_of,
    },
    "comparison": {"report": report_of},
}


def damages(folder, count, seed):
    """Yields names and verdicts of random damages of a run and of a comparison."""
    run = [*test_damage.TASK, "--checkpoint-every", 4, "--devices", 1]
    assert outcome(train.main, *run, "--output", folder / "run")[0] == 0
    made = outcome(compare.main, *test_damage.GRID, "--output", folder / "comparison")
    assert made[0] == 0
    rng = random.Random(seed)
    for name, readers in READERS.items():
        right = {way: reads(folder / name)[1]() for way, reads in readers.items()}
        verdicts = Counter()
        for _ in range(count):
            way = rng.choice(list(readers))
            verdicts[_damaged(folder / name, way, readers[way], right[way], rng)] += 1
        yield f"damages of a {name}", verdicts


def _damaged(folder, way, reads, right, rng):
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    if way == "resume":
        test_damage.not_finished(copy)
    done = damage(copy, rng)
    result, found = reads(copy)
    known = verdict(result, lambda: found() == right)
    if known in ("wrong", "traceback"):
        print(way, done, result)
    return known


def attacks(folder, options):
    """Yields names and verdicts of all attacks."""

    def place(name):
        (folder / name).mkdir()
        return folder / name

    if options.damages:
        yield from damages(place("damages"), options.damages, options.seed)
    if options.resources:
        yield "full or closed outputs", resources.bad_outputs(place("outputs"))
        limits = (8, 12, 16, 24, 32)
        yield "few descriptors", resources.few_descriptors(place("descriptors"), limits)
        try:
            yield "full disks", resources.full_disks(place("disks"), 10)
            yield "read-only places", resources.read_only(place("read-only"))
        except subprocess.CalledProcessError:
            print("full disks and read-only places were left out: they need the right to mount")
    if options.kills:
        yield from kills.attack_by_kills(place("kills"), options.kills, options.seed)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25, help="of each of four kinds")
    parser.add_argument("--damages", type=int, default=300, help="of a run, and of a comparison")
    parser.add_argument("--no-resources", dest="resources", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    print(f"{'attack':40}{'tried':>7}" + "".join(f"{name:>10}" for name in COLUMNS), flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name, verdicts in attacks(Path(folder), options):
            counts = "".join(f"{verdicts[column]:10}" for column in COLUMNS)
            print(f"{name:40}{verdicts.total():7}{counts}", flush=True)
            failed |= bool(verdicts["lost"] or verdicts["wrong"] or verdicts["traceback"])
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
