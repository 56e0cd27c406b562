"""What the commands that measure trained networks have in common."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.data import DatasetError
from experiments.measures.trained import Trained, trained_in
from experiments.run.checkpoints import CheckpointError
from experiments.system import command_line, files, machine
from experiments.system.command_line import ArgumentError, OrDefault


@dataclasses.dataclass(frozen=True)
class TrainedNetworks:
    """The options that name networks."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs and comparisons."""
    candidates: Literal["chosen", "all"] = "chosen"
    """Of a comparison: networks with the chosen hyperparameters, or with all."""
    examples: int = 1000
    """Largest number of examples to measure on."""
    data_dir: OrDefault[Path] = None
    """The folder that TFDS prepared the data set in (default: as in training, or TFDS's own)."""
    output: OrDefault[Path] = None
    """The folder to write to (default: a new one in runs/)."""

    def trained(self) -> tuple[list[Trained], dict[str, Any]]:
        """Reads the networks. See :func:`trained_in`."""
        if not self.folders:
            raise ArgumentError("name the folder of a run or a comparison")
        return trained_in(
            self.folders,
            self.examples,
            every_candidate=self.candidates == "all",
            data_dir=self.data_dir,
        )


@contextlib.contextmanager
def folder_for(output: Path | None, name: str) -> Iterator[Path]:
    """Yields the folder to write to.

    Raises:
        OSError: if it is there and not empty.
    """
    with files.given_or_new(output, name) as folder:
        files.check_new(folder)
        yield folder


def about(command: str, args: Sequence[str]) -> dict[str, Any]:
    """Returns command line, versions and hardware, for a report."""
    typed = shlex.join(["python", "-m", f"experiments.{command}", *args])
    return {"command": typed, "versions": machine.versions(), "hardware": machine.hardware()}


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[contextlib.ExitStack]:
    """Ends the program with one line on standard error for what a user can mend.

    Yields a stack for what is to be left before that.
    """
    try:
        with contextlib.ExitStack() as stack:
            yield stack
    except (ArgumentError, DatasetError, CheckpointError) as error:
        command_line.fail(str(error))
    except OSError as error:
        command_line.fail(f"--output must be a new folder: {error}")
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
