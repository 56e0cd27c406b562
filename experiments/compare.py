"""Compares methods, and says whether a difference is more than the chance of the seeds.

    python -m experiments.compare --dataset digits --label-noise 0.4 \\
        --methods sgd sam bisam-log bisam-tanh --rho 0.05 0.1 0.2 0.5 --seeds 8 --output FOLDER

trains every method with every value of its own hyperparameters from every seed, many runs in one
compiled program, and writes a report. Hyperparameters are chosen on the validation split alone.
The same command, with the same --output, goes on with a comparison that was stopped;

    python -m experiments.compare --from FOLDERS...

makes one report of finished ones, of runs of experiments.train too.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro

import bisam_jax
from experiments import command_line, data, report, results, runs
from experiments.checkpoints import CheckpointError
from experiments.config import OF_PERTURBATIONS, ArgumentError
from experiments.interruption import Interruption
from experiments.results import Comparison
from experiments.sweep import Sweep, label_of, method_of
from experiments.sweep_run import SweepRun, examples_of


@dataclasses.dataclass(frozen=True)
class Arguments(Sweep):
    """The command line: a comparison, or results to report."""

    baseline: str | None = None
    """The others are compared with this one (default: sgd if it is there, else the first)."""
    replicas_at_once: int | None = None
    """Train at most so many runs at once (default: as many as is fast and fits in memory)."""
    output: Path | None = None
    """The folder to write to (default: a new one in runs/); one that was stopped goes on."""
    from_: Annotated[tuple[Path, ...] | None, tyro.conf.arg(name="from")] = None
    """Train nothing: report the results in these folders."""

    def __post_init__(self) -> None:
        """See :class:`Sweep`."""
        super().__post_init__()
        if self.replicas_at_once is not None and self.replicas_at_once < 1:
            raise ArgumentError(
                f"--replicas-at-once must be at least 1, got {self.replicas_at_once}"
            )
        trained = [label_of(*method_of(name)) for name in self.methods]
        if self.from_ is None and self.baseline not in (None, *trained):
            raise ArgumentError(
                f"--baseline must be one of {', '.join(trained)}, got {self.baseline}"
            )


def compare(arguments: Arguments, folder: Path) -> None:
    """Trains and reports as asked.

    Args:
        arguments: the command line.
        folder: to write to.

    Raises:
        ArgumentError: if the grid does not fit the data, the memory or what is in the folder.
        DatasetError: if the data set is not there.
        CheckpointError: if what is under way cannot be read.
        KeyboardInterrupt: after a signal; the same command then goes on.
    """
    if arguments.from_ is None:
        _train(arguments, folder)
        return
    _check_alone(arguments)
    read = itertools.chain.from_iterable(map(results.read, arguments.from_))
    comparisons = results.merged(read)
    tables = report.tables_of(comparisons, arguments.baseline)
    try:
        runs.check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--output must be a new folder: {error}") from error
    report.write(folder, tables)
    results.write_merged(folder, comparisons)


def _train(arguments: Arguments, folder: Path) -> None:
    asked = arguments.configs()
    examples = examples_of(asked)  # before anything is written
    grid = asked + arguments.longer_plain(asked, examples.steps_per_epoch)
    # These have no meaning for plain training, which may be the first.
    task = results.task_of(grid[0]) | {name: getattr(arguments, name) for name in OF_PERTURBATIONS}
    about = {"task": task, "grid": _as_json(arguments), "runs": len(grid), **_about()}
    with _locked(folder), Interruption() as interruption:
        comparison = _opened(folder, about)
        (origin,) = comparison.origins
        limit = arguments.replicas_at_once
        sweep = SweepRun(grid, examples, comparison, folder, limit, interruption)
        if sweep.missing:
            _note_continuation(origin, about)
            results.write_about(folder, origin)
        speed = sweep.train()
        if speed is not None:
            origin["speed"] = speed._asdict()
            results.write_about(folder, origin)
        report.write(folder, report.tables_of([comparison], arguments.baseline))
    if speed is not None:
        print(report.speed_in_words(origin["speed"]))


def _opened(folder: Path, about: dict[str, Any]) -> Comparison:
    """What is in a folder of this grid, or nothing in an empty one."""
    path, grid = folder / "comparison.json", about["grid"]
    begun = [folder / "runs.csv", folder / "under-way", folder / "runs"]
    if not any(known.exists() for known in begun):
        return Comparison(about["task"], [], [about])
    try:
        there = json.loads(path.read_text())
        values = {name: _value(there["grid"], name) for name in grid}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArgumentError(
            f"--output {folder} has no comparison that can go on: give another folder"
        ) from error
    if odd := [name for name in grid if values[name] != grid[name]]:
        raise ArgumentError(
            f"--output {folder} has another comparison: its --{odd[0].replace('_', '-')} is "
            f"{values[odd[0]]}, not {grid[odd[0]]}"
        )
    if results.there_are_any(folder):
        (comparison,) = results.read(folder)
        return comparison
    return Comparison(about["task"], [], [there])


def _note_continuation(origin: dict[str, Any], about: dict[str, Any]) -> None:
    """Into `origin`, what now computes if it is not what computed before."""
    now = {name: about[name] for name in ("versions", "hardware")}
    before = [origin, *origin.get("continued", [])][-1]
    if now != {name: before.get(name) for name in now}:
        origin["continued"] = [*origin.get("continued", []), now]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes the folder, unless it is a comparison's, and keeps other processes out of it.

    The lock ends with this process at the latest.
    """
    try:
        if not (folder / "comparison.json").exists():
            runs.check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ArgumentError(f"--output must be a folder to write to: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ArgumentError(f"--output {folder} is in use by another process") from error
    finally:
        os.close(descriptor)


def _value(grid: dict[str, Any], name: str) -> Any:
    """Of an option, which an older version may not have had."""
    return grid.get(name, _as_json(Sweep()).get(name))


def _as_json(arguments: Sweep) -> dict[str, Any]:
    """What makes two comparisons the same; not where its data are or how it is computed."""
    names = {field.name for field in dataclasses.fields(Sweep)} - {"data_dir", "workers"}
    # Through JSON, as what is read is: tuples are lists there.
    return json.loads(json.dumps({name: getattr(arguments, name) for name in sorted(names)}))


def _about() -> dict[str, Any]:
    """How results are computed."""
    return {
        "command": shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]]),
        "versions": {
            "bisam_jax": bisam_jax.__version__,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "hardware": {
            "device": jax.devices()[0].device_kind,
            "devices": jax.local_device_count(),
            "processor": _processor(),
            "cores": _cores(),
        },
    }


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _check_alone(arguments: Arguments) -> None:
    if not arguments.from_:
        raise ArgumentError("--from must name at least one folder")
    given = [
        field.name
        for field in dataclasses.fields(Arguments)
        if getattr(arguments, field.name) != field.default
        and field.name not in ("from_", "output", "baseline")
    ]
    if given:
        raise ArgumentError(
            f"--from takes no option but --output and --baseline: remove "
            f"--{given[0].replace('_', '-')}"
        )


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    # Every core is a device that trains replicas of its own; XLA runs their batched products on
    # one core alone.
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not given and getattr(jax.config, "jax_num_cpu_devices", -1) < 1:
        with contextlib.suppress(RuntimeError):  # JAX runs already
            jax.config.update("jax_num_cpu_devices", _cores())
    arguments = command_line.parse(Arguments, __doc__ or "", args)
    folder = arguments.output or runs.new_folder(
        "comparison" if arguments.from_ else f"{arguments.dataset.replace('/', '-')}-comparison"
    )
    try:
        compare(arguments, folder)
    except (ArgumentError, data.DatasetError, CheckpointError) as error:
        command_line.fail(str(error))
    except KeyboardInterrupt:
        print(
            f"interrupted: the same command goes on from here, with --output {folder}",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    print(f"wrote {folder / 'report.md'} and {folder / 'report.html'}")


if __name__ == "__main__":
    main()
