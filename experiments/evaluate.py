"""Restores a run and measures it on each split.

    python -m experiments.evaluate runs/RUN

prints accuracy and loss of the best checkpoint, and writes them to evaluation.json in the run
folder.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from experiments.data import DatasetError
from experiments.data.workers import WorkerError
from experiments.run.checkpoints import CheckpointError
from experiments.run.folder import as_text
from experiments.run.restoring import accuracy_and_loss, restore
from experiments.system import command_line, exhaustion, files
from experiments.system.command_line import ArgumentError, OrDefault


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """The command line: which checkpoint to measure, and where."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    step: OrDefault[int] = None
    """The step of the checkpoint (default: the best epoch's)."""
    data_dir: OrDefault[Path] = None
    """The folder that TFDS prepared the data set in (default: as in training)."""
    devices: OrDefault[int] = None
    """Number of devices (default: as in training)."""
    fsdp: OrDefault[int] = None
    """Number of devices over which parameters are split (default: as in training)."""


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    options = command_line.parse(EvaluateOptions, __doc__ or "", args)
    places = {name: getattr(options, name) for name in ("data_dir", "devices", "fsdp")}
    try:
        restored = restore(options.run, options.step, **places)
    except (ArgumentError, DatasetError, CheckpointError) as error:
        command_line.fail(str(error))
    try:
        measured = accuracy_and_loss(restored.experiment, restored.state)
    except (DatasetError, WorkerError) as error:
        command_line.fail(str(error))
    results = {"step": restored.step, "accuracy_and_loss": measured}
    print(f"checkpoint of step {restored.step}")
    for name, row in measured.items():
        print(
            f"{name:10}  accuracy {100 * row['accuracy']:6.2f} %  loss {row['loss']:.4f}  "
            f"on {row['examples']} examples"
        )
    try:
        files.write_text(options.run / "evaluation.json", as_text(results))
    except OSError as error:
        print(f"not written to {options.run}: {error.strerror}")


if __name__ == "__main__":
    exhaustion.run(main)
