"""Compares methods, and says whether a difference is more than the chance of the seeds.

    python -m experiments.compare --dataset digits --label-noise 0.4 \\
        --methods sgd sam bisam-log bisam-tanh --rho 0.05 0.1 0.2 0.5 --seeds 8

trains every method with every value of its own hyperparameters from every seed, many runs in one
compiled program, and writes a report. Hyperparameters are chosen on the validation split alone.
The same command goes on with a comparison that was stopped;

    python -m experiments.compare --from FOLDERS...

makes one report of finished ones, of runs of experiments.train too.
"""

import contextlib
import dataclasses
import fcntl
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
from experiments.config import ArgumentError
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
    from_: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Train nothing: report the results in these folders."""

    def __post_init__(self) -> None:
        """See :class:`Sweep`."""
        super().__post_init__()
        if self.replicas_at_once is not None and self.replicas_at_once < 1:
            raise ArgumentError(
                f"--replicas-at-once must be at least 1, got {self.replicas_at_once}"
            )
        trained = [label_of(*method_of(name)) for name in self.methods]
        if not self.from_ and self.baseline not in (None, *trained):
            raise ArgumentError(
                f"--baseline must be one of {', '.join(trained)}, got {self.baseline}"
            )


def compare(arguments: Arguments) -> Path:
    """Trains and reports as asked; returns the folder.

    Raises:
        ArgumentError: if the grid does not fit the data, the memory or what is in the folder.
        DatasetError: if the data set is not there.
        CheckpointError: if what is under way cannot be read.
        KeyboardInterrupt: after a signal; the same command then goes on.
    """
    folder = arguments.output or runs.new_folder(
        "comparison" if arguments.from_ else f"{arguments.dataset.replace('/', '-')}-comparison"
    )
    if arguments.from_:
        _check_alone(arguments)
        comparisons = results.merged(map(results.read, arguments.from_))
        try:
            runs.check_new(folder)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"--output must be a new folder: {error}") from error
    else:
        comparisons = [_trained(arguments, folder)]
    report.write(folder, comparisons, _baseline(arguments, comparisons))
    return folder


def _trained(arguments: Arguments, folder: Path) -> Comparison:
    grid = arguments.configs()
    task = results.task_of(grid[0])
    examples = examples_of(grid)  # before anything is written
    with _opened(folder, _as_json(arguments), task) as comparison, Interruption() as interruption:
        limit = arguments.replicas_at_once
        speed = SweepRun(grid, examples, comparison, folder, limit, interruption).train()
        if speed is not None:
            comparison.origins[0]["speed"] = speed._asdict()
            print(report.speed_in_words(comparison.origins[0]["speed"]))
            _write_about(folder, comparison.origins[0])
    return comparison


@contextlib.contextmanager
def _opened(folder: Path, grid: dict[str, Any], task: dict[str, Any]) -> Iterator[Comparison]:
    """What is in a folder of this grid, or a new one; no other process can have it."""
    path = folder / "comparison.json"
    try:
        if path.exists():
            comparison = results.read(folder)
            there = comparison.origins[0]["grid"]
            if odd := [name for name in grid if there.get(name) != grid[name]]:
                raise ArgumentError(
                    f"--output {folder} has another comparison: its --{odd[0].replace('_', '-')} "
                    f"is {there.get(odd[0])}, not {grid[odd[0]]}"
                )
        else:
            runs.check_new(folder)
            folder.mkdir(parents=True, exist_ok=True)
            about = {"task": task, "grid": grid, **_about()}
            comparison = Comparison(task, [], [about])
            results.write(folder, comparison)
            _write_about(folder, about)
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield comparison
    except BlockingIOError as error:
        raise ArgumentError(f"--output {folder} is in use by another process") from error
    except OSError as error:
        raise ArgumentError(f"--output must be a folder to write to: {error}") from error


def _as_json(arguments: Arguments) -> dict[str, Any]:
    """What makes two comparisons the same; not where its data are or how it is computed."""
    names = {field.name for field in dataclasses.fields(Sweep)} - {"data_dir", "workers"}
    # Through JSON, as what is read is: tuples are lists there.
    return json.loads(json.dumps({name: getattr(arguments, name) for name in sorted(names)}))


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    # In place: the file is locked.
    (folder / "comparison.json").write_text(json.dumps(about, indent=2) + "\n")


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
            "cores": os.cpu_count(),
        },
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _baseline(arguments: Arguments, comparisons: Sequence[Comparison]) -> str:
    if arguments.baseline is not None:
        return arguments.baseline
    there = [result.method for comparison in comparisons for result in comparison.results]
    return "sgd" if "sgd" in there else there[0]


def _check_alone(arguments: Arguments) -> None:
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
            jax.config.update("jax_num_cpu_devices", os.cpu_count())
    arguments = command_line.parse(Arguments, __doc__ or "", args)
    try:
        folder = compare(arguments)
    except (ArgumentError, data.DatasetError, CheckpointError) as error:
        command_line.fail(str(error))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"wrote {folder / 'report.md'} and {folder / 'report.html'}")


if __name__ == "__main__":
    main()
