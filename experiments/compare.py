"""Compares methods, and says which differences are statistically significant.

    python -m experiments.compare --dataset digits --label-noise 0.4 \\
        --methods sgd sam bisam-log bisam-tanh --rho 0.05 0.1 0.2 0.5 --seeds 8 --output FOLDER

trains every method with every value of its hyperparameters and every seed, many runs in one
compiled program, and writes a report. Hyperparameters are chosen only on the validation split. To
resume a stopped comparison, run the same command with the same --output.

    python -m experiments.compare --from FOLDERS...

writes one report of finished comparisons and of runs of experiments.train.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from experiments.comparison.comparing import compare, report_again
from experiments.comparison.grid import Grid
from experiments.config.config import check_ranges, option_of
from experiments.config.hyperparameters import Range
from experiments.data import DatasetError
from experiments.run.checkpoints import CheckpointError
from experiments.run.ends import StoppedRunError
from experiments.system import command_line, exhaustion, files, machine
from experiments.system.command_line import ArgumentError, OrDefault
from experiments.system.suggestions import did_you_mean


@dataclasses.dataclass(frozen=True)
class CompareOptions(Grid):
    """The command line: a grid to train, or results to report."""

    baseline: OrDefault[str] = None
    """The method to compare the others with (default: sgd if it is trained, else the first)."""
    replicas_at_once: OrDefault[int] = None
    """Largest number of runs at once (default: as many as is fast and fits in memory)."""
    keep_networks: bool = True
    """Keep the parameters of every run's best epoch, to measure them with experiments.sharpness
    and experiments.robustness."""
    output: OrDefault[Path] = None
    """The folder to write to (default: a new one in runs/). A comparison in it is resumed."""
    from_: Annotated[tuple[Path, ...] | None, tyro.conf.arg(name="from")] = None
    """Train nothing. Report the results in these folders."""

    def __post_init__(self) -> None:
        """Refuses what cannot be compared. Messages name the options."""
        super().__post_init__()
        check_ranges(self, {"replicas_at_once": Range(1)})
        if self.from_ is not None:
            self._check_from()
        elif self.baseline not in (None, *self.labels):
            raise ArgumentError(
                f"--baseline must be one of {', '.join(self.labels)}, got {self.baseline}."
                f"{did_you_mean(str(self.baseline), self.labels)}"
            )

    def _check_from(self) -> None:
        if not self.from_:
            raise ArgumentError("--from must name at least one folder")
        for field in dataclasses.fields(self):
            if field.name in ("from_", "output", "baseline"):
                continue
            if getattr(self, field.name) != field.default:
                raise ArgumentError(
                    f"--from takes no option but --output and --baseline: remove "
                    f"{option_of(field.name)}"
                )


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    machine.make_cores_devices()
    given = sys.argv[1:] if args is None else args
    options = command_line.parse(CompareOptions, __doc__ or "", given)
    name = "comparison" if options.from_ else f"{options.dataset.replace('/', '-')}-comparison"
    with files.given_or_new(options.output, name) as folder:
        _compare(options, folder, given)
    print(f"wrote {folder / 'report.md'} and {folder / 'report.html'}")


def _compare(options: CompareOptions, folder: Path, given: Sequence[str]) -> None:
    try:
        if options.from_:
            report_again(options.from_, folder, options.baseline)
        else:
            compare(
                options,
                folder,
                command=shlex.join(["python", "-m", "experiments.compare", *given]),
                baseline=options.baseline,
                replicas_at_once=options.replicas_at_once,
                keep_networks=options.keep_networks,
            )
    except (ArgumentError, DatasetError, CheckpointError) as error:
        command_line.fail(str(error))
    except StoppedRunError as stopped:
        message = f"{stopped.why}; to resume, run the same command with --output {folder}"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception as error:
        if what := exhaustion.what_is_exhausted(error):
            how = f"To resume, run the same command with --output {folder}"
            raise exhaustion.ExhaustedError(f"{what}. What was saved is kept. {how}") from error
        raise
    except KeyboardInterrupt:
        message = f"interrupted: to resume, run the same command with --output {folder}"
        print(message, file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    exhaustion.run(main)
