"""Measures how strong perturbations are: BiSAM's claim that its loss makes them stronger.

    python -m experiments.strength --dataset digits --seeds 5

trains networks by SGD, SAM and BiSAM (-log), and measures along the way how much the error and the
loss of a batch rise at w + eps, with eps from the training loss and from BiSAM's losses. It writes
a report. It takes two minutes on two CPU cores.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.comparison.grid import Grid
from experiments.config.config import check_ranges
from experiments.config.hyperparameters import Range
from experiments.data import DatasetError, base_name
from experiments.measures.strength_report import write_strength_report
from experiments.measures.strength_run import measured_along
from experiments.system import command_line, files, machine
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
        check_ranges(self, {"batches": Range(1)})
        positive = Range(0, above=True)
        for option, values, allowed in (
            ("--at", self.at, Range(0)),
            ("--radii", self.radii, positive),
            ("--measured-mu", self.measured_mu, positive),
            ("--measured-alpha", self.measured_alpha, positive),
        ):
            if not values or not all(value in allowed for value in values):
                raise ArgumentError(f"{option} must be numbers {allowed}, got {values}")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    machine.make_cores_devices()
    given = sys.argv[1:] if args is None else args
    options = command_line.parse(StrengthOptions, __doc__ or "", given)
    folder = options.output or files.new_folder(f"{base_name(options.dataset)}-strength")
    try:
        files.check_new(folder)
        measured = measured_along(
            options,
            sorted(set(options.at)),
            tuple(sorted(set(options.radii))),
            options.measured_mu,
            options.measured_alpha,
            options.batches,
        )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        command_line.fail(f"--output must be a new folder: {error}")
    except (ArgumentError, DatasetError) as error:
        command_line.fail(str(error))
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    command = shlex.join(["python", "-m", "experiments.strength", *given])
    about = {"command": command, "versions": machine.versions(), "hardware": machine.hardware()}
    write_strength_report(folder, measured, options.task, about)
    print(f"wrote {folder / 'report.md'} and {folder / 'report.html'}")


if __name__ == "__main__":
    main()
