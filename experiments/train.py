"""Trains a model and writes one run folder.

    python -m experiments.train

trains a perceptron on scikit-learn's digits with BiSAM (-log): 7 s on two CPU cores, imports and
compilation included, and 98.25 % test accuracy (standard deviation 0.51, 10 seeds: rho 0.05 in
experiments/results/digits-noise-0).

    python -m experiments.train --preset bisam-cifar10 --precision bfloat16

is the recipe of BiSAM's authors, for a GPU or TPU. A run that was stopped goes on bit for bit with

    python -m experiments.train --resume runs/RUN
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import command_line, data, processes, runs
from experiments.checkpoints import CheckpointError
from experiments.config import PLACES, ArgumentError, Config
from experiments.experiment import Experiment
from experiments.interruption import Interruption, SharedInterruption
from experiments.presets import PRESETS
from experiments.run import NonFiniteLossError, Run


def train(config: Config, resume: Path | None = None) -> dict[str, Any]:
    """Trains as configured; returns the summary that it also writes to the run folder.

    Args:
        config: what to train; with `resume`, that of the run, as :func:`load_config` gives it.
        resume: a run folder to go on with, from its last checkpoint.

    Raises:
        ArgumentError: if the configuration does not fit the data, or the run folder exists or
            cannot be made.
        DatasetError: if the data set is not there.
        CheckpointError: if a checkpoint cannot be read.
        NonFiniteLossError: if a loss is not finite; names the step.
        KeyboardInterrupt: on Ctrl-C, after the launch under way, with a checkpoint of it. Then,
            and after a SIGTERM, which returns, the summary's status is "interrupted". Of several
            processes, Ctrl-C ends one at once.
    """
    if resume is not None:
        summary = runs.RunFolder(resume).read_summary()
        if summary.get("status") == "finished":
            return summary
    with contextlib.ExitStack() as stack:
        shared = jax.process_count() > 1
        interruption = stack.enter_context(SharedInterruption() if shared else Interruption())
        if resume is None:
            processes.from_first(lambda: _check_output(config.output))  # before the data is read
        if shared:
            stack.enter_context(processes.last_words(_last_words(resume or config.output)))
        run = None
        try:
            experiment = Experiment(config)
            folder = stack.enter_context(contextlib.closing(_open(experiment.config, resume)))
            values = _as_json(experiment.config)
            print(" ".join(f"{name}={value}" for name, value in values.items()))
            run = stack.enter_context(contextlib.closing(Run(experiment, folder)))
            run.train(interruption)
            return run.finish(interruption)
        except NonFiniteLossError as error:
            if run is not None:
                run.write_summary(str(error))
            raise
        except jax.errors.JaxRuntimeError as error:
            if shared:
                processes.abandon(error)
            raise


def _last_words(folder: Path | None) -> str:
    return (
        "error: this process was ended; if it says above that a task died or that a connection is "
        "lost, another process of the run is gone. Start all of them again with "
        f"--resume {folder or 'and the run folder'}: the run goes on from its last checkpoint\n"
    )


def _check_output(path: Path | None) -> str:
    if path is not None:
        try:
            runs.check_new(path)
        except OSError as error:
            raise ArgumentError(f"--output must be a new folder: {error}") from error
    return ""


def _open(config: Config, resume: Path | None) -> runs.RunFolder:
    """The folder to write to, made and locked by the first process."""
    opened = []

    def open_() -> str:
        assert config.output is not None
        try:
            if resume is None:
                folder = runs.RunFolder.create(config.output, _as_json(config))
            else:
                folder = runs.RunFolder(resume)
            folder.lock()
        except OSError as error:
            raise ArgumentError(f"--output must be a folder to write to: {error}") from error
        opened.append(folder)
        return str(folder.path)

    path = Path(processes.from_first(open_))
    return opened[0] if opened else runs.RunFolder(path, writes=False)


def load_config(run: Path) -> Config:
    """The configuration of a run folder.

    Raises:
        ArgumentError: if it is none, or not of this version.
    """
    try:
        values = runs.read_config(run)
        fields = {field.name for field in dataclasses.fields(Config)}
        if odd := fields ^ set(values):
            raise ValueError(f"its config.json is of another version: {', '.join(sorted(odd))}")
        paths = {"output": run, "data_dir": values["data_dir"] and Path(values["data_dir"])}
        return Config(**values | paths)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{run} cannot be read as a run: {error}") from error


def _as_json(config: Config) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def _shared(config: Config) -> str:
    """What all processes of a run must be told alike."""
    own = ("data_dir", "workers", "output")
    return str({name: value for name, value in _as_json(config).items() if name not in own})


@dataclasses.dataclass(frozen=True)
class Arguments(Config):
    """The command line: a configuration, or a run to go on with."""

    resume: Path | None = None
    """Go on with this run, as if it had never stopped; it has its configuration already."""
    # None, to tell what was asked for when a run goes on.
    parallelism: Literal["jit", "shard_map", "pmap"] | None = None  # type: ignore[assignment]
    """One program for all devices, or one for each (default jit)."""
    fsdp: int | None = None  # type: ignore[assignment]
    """Split parameters and optimizer state over so many of the devices (default 1)."""

    distributed: bool = False
    """Join other processes, each started with this same command; see docs/devices.md."""
    coordinator_address: str | None = None
    """Host and port of the first process (default: JAX finds it, as on TPUs and under Slurm)."""
    num_processes: int | None = None
    """How many processes there are (default: as above)."""
    process_id: int | None = None
    """Which of them this is, from 0 (default: as above)."""
    heartbeat_timeout: int = 60
    """Seconds of silence after which a process counts as gone, and the others end."""

    def given(self) -> list[str]:
        """The options that are not at their default."""
        names = {field.name for field in dataclasses.fields(Config)}
        fields = [field for field in dataclasses.fields(self) if field.name in names]
        return [field.name for field in fields if getattr(self, field.name) != field.default]


def _config_of(arguments: Arguments) -> Config:
    if arguments.resume is None:
        return Config(**{name: getattr(arguments, name) for name in arguments.given()})
    config = load_config(arguments.resume)
    changed = arguments.given()
    if not set(changed) <= {"data_dir", *PLACES}:
        kept = ", ".join(f"--{name}" for name in ("data-dir", *PLACES))
        raise ArgumentError(
            f"--resume takes the run's own configuration: remove all other options but {kept}"
        )
    return dataclasses.replace(config, **{name: getattr(arguments, name) for name in changed})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    presets = {name: Arguments(**dataclasses.asdict(config)) for name, config in PRESETS.items()}
    arguments = command_line.parse(Arguments, __doc__ or "", args, presets)
    try:
        processes.join(
            arguments.distributed,
            arguments.coordinator_address,
            arguments.num_processes,
            arguments.process_id,
            arguments.heartbeat_timeout,
        )
        with contextlib.ExitStack() as stack:
            if not processes.is_first():
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            config = processes.agreed(lambda: _config_of(arguments), _shared, "options")
            summary = train(config, arguments.resume)
    except (ArgumentError, data.DatasetError, CheckpointError) as error:
        command_line.fail(str(error))
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted: --resume and the run folder go on from here", file=sys.stderr)
        raise SystemExit(130) from None
    if not processes.is_first():
        return
    if summary["status"] == "interrupted":
        print(f"saved at step {summary['steps']}: --resume and the run folder go on from here")
        return
    print(
        f"test accuracy {100 * summary['test_accuracy']:.2f} % on {summary['test_examples']} "
        f"examples (checkpoint of epoch {summary['checkpoint_epoch']}, {summary['seconds']:.1f} s, "
        f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB at most)"
    )


if __name__ == "__main__":
    main()
