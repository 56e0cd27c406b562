"""Measures the sharpness and the curvature of trained networks, and writes a report.

    python -m experiments.sharpness runs/RUN runs/COMPARISON --output FOLDER

takes runs of experiments.train and comparisons of experiments.compare. Networks that differ only in
their seed are measured together.
"""

import dataclasses
import sys
from collections.abc import Sequence

from experiments.config.config import check_ranges
from experiments.config.hyperparameters import Range
from experiments.data import base_name
from experiments.measures.command import TrainedNetworks, about, errors_in_one_line, folder_for
from experiments.measures.findings import Finding, Measures
from experiments.measures.sharpness import (
    grid_of,
    measured_curvature,
    measured_sharpness,
    measured_spectrum,
)
from experiments.measures.sharpness_report import write_sharpness_report
from experiments.measures.slices import Slices, measured_slices
from experiments.system import command_line, exhaustion, progress
from experiments.system.command_line import ArgumentError, OrDefault

_POINTS_OF_SPECTRUM = 201


@dataclasses.dataclass(frozen=True)
class SharpnessOptions(TrainedNetworks):
    """The command line: which networks to measure, and how."""

    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)
    """Radii of l2 balls."""
    adaptive_radii: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Radii of adaptive l2 balls, which are measured in units of the weights."""
    steps: int = 20
    """Finding of gradients of the ascent to the worst case."""
    directions: int = 32
    """Finding of random directions, and of probes of the trace."""
    eigenvalues: int = 5
    """Finding of largest eigenvalues of the Hessian."""
    num_matvecs: int = 30
    """Finding of products with the Hessian, for the eigenvalues and for each probe of the
    spectrum."""
    points: int = 21
    """Finding of places along each direction of a slice, an odd number."""
    normalise_logits: bool = False
    """Normalize the logits, so that their scale does not change the sharpness."""
    microbatch_size: OrDefault[int] = None
    """Finding of examples in memory at a time (default: all)."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured. Messages name the options."""
        counts = ("examples", "steps", "eigenvalues", "num_matvecs", "microbatch_size")
        ranges = {**dict.fromkeys(counts, Range(1)), "directions": Range(2)}
        ranges |= dict.fromkeys(("radii", "adaptive_radii"), Range(0, above=True))
        check_ranges(self, ranges)
        if self.points < 3 or self.points % 2 == 0:
            raise ArgumentError(f"--points must be odd, at least 3, got {self.points}")
        if self.eigenvalues > self.num_matvecs:
            raise ArgumentError(
                f"--eigenvalues must be at most --num-matvecs, {self.num_matvecs}, got "
                f"{self.eigenvalues}"
            )

    @property
    def measures(self) -> Measures:
        """What to measure."""
        return Measures(
            tuple(sorted(set(self.radii))),
            tuple(sorted(set(self.adaptive_radii))),
            self.steps,
            self.directions,
            self.eigenvalues,
            self.num_matvecs,
            self.normalise_logits,
            self.microbatch_size,
        )


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if args is None else args
    options = command_line.parse(SharpnessOptions, __doc__ or "", given)
    measures = options.measures
    with errors_in_one_line() as stack:
        trained, task = options.trained()
        folder = stack.enter_context(
            folder_for(options.output, f"{base_name(task['dataset'])}-sharpness")
        )
        numbers: list[Finding] = []
        slices: dict[str, Slices] = {}
        with progress.shown(4 * len(trained), "measure") as bar:
            for networks in trained:
                # First, since it refuses what does not fit in memory.
                numbers += measured_curvature(networks, measures)
                bar.advance(1)
                numbers += measured_sharpness(networks, measures)
                bar.advance(1)
                name, normalised = networks.name, measures.normalised_logits
                slices[name] = measured_slices(networks, options.points, normalised)
                bar.advance(1)
            grid = grid_of(numbers, _POINTS_OF_SPECTRUM)
            for networks in trained:
                numbers += measured_spectrum(networks, measures, *grid)
                bar.advance(1)
        folder.mkdir(parents=True, exist_ok=True)
        known = about("sharpness", given) | {"examples": len(trained[0].train.images)}
        write_sharpness_report(folder, numbers, slices, measures, task, known)
    print(f"wrote {folder / 'report.md'} and {folder / 'report.html'}")


if __name__ == "__main__":
    exhaustion.run(main)
