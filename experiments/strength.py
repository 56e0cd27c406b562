"""Measures how strong perturbations are: BiSAM's claim that its loss makes them stronger.

    python -m experiments.strength --dataset digits --seeds 5

trains networks by SGD, SAM and BiSAM (-log), and measures along the way how much the error and the
loss of a batch rise at w + eps, with eps from the training loss and from BiSAM's losses. It writes
a report. It takes two minutes on two CPU cores.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.comparison.grid import Grid
from experiments.config.config import check_ranges
from experiments.config.hyperparameters import Range
from experiments.data import base_name
from experiments.measures.command import about, errors_in_one_line, folder_for
from experiments.measures.strength_report import write_strength_report
from experiments.measures.strength_run import measured_along
from experiments.system import command_line, exhaustion, machine
from experiments.system.command_line import ArgumentError, OrDefault


@dataclasses.dataclass(frozen=True)
class StrengthOptions(Grid):
    """The command line: the runs to train, and what to measure."""

    methods: tuple[str, ...] = ("sgd", "sam", "bisam-log")
    """Methods that train the networks. METHOD+log and METHOD+tanh ascend BiSAM's losses."""
    seeds: int = 5
    """Number of networks per method."""
    at: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    """Epochs after which to measure; 0 is the initialization."""
    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)
    """Radii of the measured perturbations."""
    measured_mu: tuple[float, ...] = (1.0, 10.0)
    """Values of mu of the measured losses."""
    measured_alpha: tuple[float, ...] = (0.1, 1.0)
    """Values of alpha of the measured tanh losses."""
    batches: int = 16
    """Number of batches to measure on."""
    output: OrDefault[Path] = None
    """The folder to write to (default: a new one in runs/)."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured. Messages name the options."""
        super().__post_init__()
        if self.confirm:
            raise ArgumentError("--confirm has no meaning here: nothing is chosen")
        positive = dict.fromkeys(("radii", "measured_mu", "measured_alpha"), Range(0, above=True))
        check_ranges(self, {"batches": Range(1), "at": Range(0), **positive})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    machine.make_cores_devices()
    given = sys.argv[1:] if args is None else args
    options = command_line.parse(StrengthOptions, __doc__ or "", given)
    with errors_in_one_line() as stack:
        folder = stack.enter_context(
            folder_for(options.output, f"{base_name(options.dataset)}-strength")
        )
        measured = measured_along(
            options,
            sorted(set(options.at)),
            tuple(sorted(set(options.radii))),
            options.measured_mu,
            options.measured_alpha,
            options.batches,
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_strength_report(folder, measured, options.task, about("strength", given))
    print(f"wrote {folder / 'report.md'} and {folder / 'report.html'}")


if __name__ == "__main__":
    exhaustion.run(main)
