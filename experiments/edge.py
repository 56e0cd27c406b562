"""Measures where the curvature settles in training with the full batch, for SAM and BiSAM.

    python -m experiments.edge --dataset digits

trains a deep perceptron by gradient descent, SAM and BiSAM, measures the largest eigenvalue of the
Hessian along the way, and compares it with the edge of stability and with SAM's edge (Long and
Bartlett, 2309.12488). It writes a report.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from experiments.config.config import check_ranges
from experiments.config.hyperparameters import Range
from experiments.data import Source, base_name
from experiments.measures.command import about, errors_in_one_line, folder_for
from experiments.measures.edge import METHODS_AT_THE_EDGE, Setting, curvature_along
from experiments.measures.edge_report import write_edge_report
from experiments.system import command_line, exhaustion
from experiments.system.command_line import ArgumentError, OrDefault
from experiments.system.suggestions import did_you_mean


@dataclasses.dataclass(frozen=True)
class EdgeOptions:
    """The command line."""

    dataset: str = "digits"
    """A data set of experiments.train that fits in memory."""
    data_dir: OrDefault[Path] = None
    """The folder that TFDS prepared the data set in (default: TFDS's own)."""
    train_examples: OrDefault[int] = None
    """Number of training examples (default: all but the validation part)."""
    methods: tuple[str, ...] = METHODS_AT_THE_EDGE
    """Methods: gd, sam, bisam-log, bisam-tanh."""
    loss: Literal["squared", "logistic"] = "squared"
    """The training loss."""
    learning_rate: float = 0.05
    """Step size. There is no momentum and no schedule."""
    rho: float = 0.1
    """Radius of the perturbation."""
    widths: tuple[int, ...] = (100, 100, 100)
    """Numbers of hidden units."""
    steps: int = 4000
    """Number of steps."""
    every: int = 100
    """Number of steps between two measurements."""
    seeds: int = 3
    """Number of initializations."""
    output: OrDefault[Path] = None
    """The folder to write to (default: a new one in runs/)."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured. Messages name the options."""
        positive, counts = Range(0, above=True), ("train_examples", "widths", "steps", "every")
        ranges = dict.fromkeys((*counts, "seeds"), Range(1))
        check_ranges(self, ranges | dict.fromkeys(("learning_rate", "rho"), positive))
        for method in self.methods:
            if method not in METHODS_AT_THE_EDGE:
                raise ArgumentError(
                    f"--methods must be {', '.join(METHODS_AT_THE_EDGE)}, got {method}."
                    f"{did_you_mean(method, METHODS_AT_THE_EDGE)}"
                )
        if self.steps % self.every:
            raise ArgumentError(f"--every must divide --steps, got {self.every} and {self.steps}")

    @property
    def setting(self) -> Setting:
        """How the networks are trained."""
        names = ("loss", "learning_rate", "rho", "steps", "every", "widths")
        return Setting(*(getattr(self, name) for name in names))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if args is None else args
    options = command_line.parse(EdgeOptions, __doc__ or "", given)
    source = Source(options.dataset, options.train_examples, data_dir=options.data_dir)
    with errors_in_one_line() as stack:
        folder = stack.enter_context(
            folder_for(options.output, f"{base_name(options.dataset)}-edge")
        )
        measured, examples = curvature_along(
            source, options.methods, options.seeds, options.setting
        )
        folder.mkdir(parents=True, exist_ok=True)
        known = about("edge", given) | {"dataset": options.dataset, "examples": examples}
        write_edge_report(folder, measured, options.setting, known)
    print(f"wrote {folder / 'report.md'} and {folder / 'report.html'}")


if __name__ == "__main__":
    exhaustion.run(main)
