"""Trains a model and writes one run folder.

    python -m experiments.train

trains a perceptron on scikit-learn's digits with BiSAM (-log). It takes 7 s on two CPU cores,
imports and compilation included, and reaches 98.25 % test accuracy (standard deviation 0.51, 10
seeds; rho 0.05 in results/digits-noise-0).

    python -m experiments.train --preset bisam-cifar10 --precision bfloat16

trains the recipe of BiSAM's authors, for a GPU or TPU. To resume a stopped run bit for bit:

    python -m experiments.train --resume runs/RUN
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.config.config import CHANGEABLE, Config, Place, option_of
from experiments.config.presets import PRESETS
from experiments.data import DatasetError
from experiments.run.checkpoints import CheckpointError
from experiments.run.ends import InterruptedRunError, StoppedRunError
from experiments.run.folder import as_json, read_config
from experiments.run.training import train
from experiments.system import command_line, exhaustion, processes
from experiments.system.command_line import ArgumentError, OrDefault
from experiments.system.files import as_typed

# Options that may differ when a run is resumed.
_RESUMABLE = ("data_dir", *(field.name for field in dataclasses.fields(Place)), *CHANGEABLE)


@dataclasses.dataclass(frozen=True)
class TrainOptions(Config):
    """The command line: the options of a run, or a run to resume."""

    resume: OrDefault[Path] = None
    """The folder of a run to resume, as if it had never stopped. The options are the run's own. A
    run that diverged can be resumed with a smaller --learning-rate or --rho."""
    # With None as default, a resumed run knows whether they are given.
    parallelism: OrDefault[Literal["jit", "shard_map", "pmap"]] = None  # type: ignore[assignment]
    """How devices share a batch: one program for all, or one for each (default: jit)."""
    fsdp: OrDefault[int] = None  # type: ignore[assignment]
    """Number of devices over which parameters and optimizer state are split (default: 1)."""

    distributed: bool = False
    """Join other processes, each started with this same command (see docs/devices.md)."""
    coordinator_address: OrDefault[str] = None
    """Host and port of the first process (default: JAX finds it, as on TPUs and under Slurm)."""
    num_processes: OrDefault[int] = None
    """Number of processes (default: JAX finds it)."""
    process_id: OrDefault[int] = None
    """Number of this process, from 0 (default: JAX finds it)."""
    heartbeat_timeout: int = 60
    """Seconds of silence after which a process counts as gone and the others end."""

    @property
    def config(self) -> Config:
        """The options of the run: the given ones, or those of the run to resume."""
        names = {field.name for field in dataclasses.fields(Config)}
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in names and getattr(self, field.name) != field.default
        }
        if self.resume is None:
            return Config(**given)
        config = read_config(self.resume)
        if not set(given) <= set(_RESUMABLE):
            raise ArgumentError(
                "--resume takes the run's own options: remove all other options but "
                f"{', '.join(map(option_of, _RESUMABLE))}"
            )
        return dataclasses.replace(config, **given)


def shared_options(config: Config) -> str:
    """Returns the options that all processes of a run must have in common, as text."""
    own = ("data_dir", "workers", "output")
    return str({name: value for name, value in as_json(config).items() if name not in own})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    presets = {name: TrainOptions(**dataclasses.asdict(known)) for name, known in PRESETS.items()}
    options = command_line.parse(TrainOptions, __doc__ or "", args, presets)
    try:
        processes.join(
            options.distributed,
            options.coordinator_address,
            options.num_processes,
            options.process_id,
            options.heartbeat_timeout,
        )
        with contextlib.ExitStack() as stack:
            if not processes.is_first():
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            config = processes.agreed(lambda: options.config, shared_options, "options")
            summary = train(config, options.resume)
    except (ArgumentError, DatasetError, CheckpointError) as error:
        command_line.fail(str(error))
    except StoppedRunError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except InterruptedRunError as interrupted:
        print(_in_words(interrupted.summary))
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        message = "interrupted before it could save: --resume takes the last checkpoint, if any"
        print(message, file=sys.stderr)
        raise SystemExit(130) from None
    if processes.is_first():
        print(_in_words(summary))


def _in_words(summary: dict[str, Any]) -> str:
    """Returns the last lines of the output: the result, and where it is."""
    folder = as_typed(Path(summary["folder"]))
    finished = summary["status"] == "finished"
    lines = []
    if summary["test_accuracy"] is not None:
        so_far = "" if finished else " so far"
        lines.append(
            f"test accuracy {100 * summary['test_accuracy']:.2f} % on {summary['test_examples']} "
            f"examples: epoch {summary['checkpoint_epoch']}, the best validation accuracy{so_far}"
        )
    lines.append(
        f"took         {summary['seconds']:.1f} s, {summary['peak_memory_bytes'] / 2**30:.2f} GiB "
        "at most"
    )
    if finished:
        lines.append(f"curves       {folder / 'curves.png'}")
        lines.append(f"TensorBoard  tensorboard --logdir {folder / 'tensorboard'}")
    else:
        lines.append(f"interrupted and saved after step {summary['steps']}. To resume:")
        lines.append(f"    python -m experiments.train --resume {folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    exhaustion.run(main)
