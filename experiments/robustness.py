"""Measures how robust trained networks are to small perturbations of their images.

    python -m experiments.robustness runs/RUN runs/COMPARISON --output FOLDER

takes runs of experiments.train and comparisons of experiments.compare, attacks their networks by
projected gradient descent, checks that the attacks are strong enough, and writes a report. Networks
that differ only in their seed are attacked together.
"""

import dataclasses
import sys
from collections.abc import Sequence

from experiments.config.config import check_ranges
from experiments.config.hyperparameters import Range
from experiments.data import base_name
from experiments.measures.attacks import WORST, Attack, Attacker, usual_attack
from experiments.measures.command import TrainedNetworks, about, errors_in_one_line, folder_for
from experiments.measures.masking import checked
from experiments.measures.robustness_report import rows_of_accuracies, write_robustness_report
from experiments.measures.trained import Trained
from experiments.system import command_line, exhaustion, progress


@dataclasses.dataclass(frozen=True)
class RobustnessOptions(TrainedNetworks):
    """The command line: which networks to attack, and how."""

    linf: tuple[float, ...] = (1.0, 2.0)
    """Radii of l-infinity balls in units of 1/255. The step is a quarter of the radius."""
    l2: tuple[float, ...] = (16.0, 32.0)
    """Radii of l2 balls in units of 1/255. The step is an eighth of the radius."""
    steps: int = 10
    """Number of gradients of an attack."""
    restarts: int = 2
    """Number of random starts for each of the losses, the cross-entropy and the margin."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured. Messages name the options."""
        pixels = Range(0, 255, above=True)
        counts = dict.fromkeys(("examples", "steps", "restarts"), Range(1))
        radii = {"linf": pixels, "l2": Range(0, above=True)}
        check_ranges(self, {**counts, **radii})

    @property
    def attacks(self) -> list[Attack]:
        """The attacks of the table."""
        how = {"steps": self.steps, "restarts": self.restarts}
        linf = [usual_attack("linf", radius, **how) for radius in sorted(set(self.linf))]
        return linf + [usual_attack("l2", radius, **how) for radius in sorted(set(self.l2))]


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if args is None else args
    options = command_line.parse(RobustnessOptions, __doc__ or "", given)
    with errors_in_one_line() as stack:
        trained, task = options.trained()
        folder = stack.enter_context(
            folder_for(options.output, f"{base_name(task['dataset'])}-robustness")
        )
        plain = next((t for t in trained if t.recipe.method_spec.is_plain), None)
        of_plain = (plain.name, Attacker(plain)) if plain else None
        rows, checks, of_checks = [], [], []
        with progress.shown((len(options.attacks) + 1) * len(trained), "attack") as bar:
            for networks in trained:
                name, seeds, attacker = networks.name, networks.seeds, Attacker(networks)
                rows += rows_of_accuracies(name, seeds, {WORST: attacker.clean_accuracy})
                for attack in options.attacks:
                    rows += rows_of_accuracies(name, seeds, attacker.accuracies(attack), attack)
                    bar.advance(1)
                other = of_plain if plain and _differ_in_training(plain, networks) else None
                strongest = options.attacks[len(set(options.linf)) - 1]
                made, needed = checked(name, seeds, attacker, strongest, other)
                checks += made
                of_checks += needed
                bar.advance(1)
        folder.mkdir(parents=True, exist_ok=True)
        baseline = plain.name if plain else trained[0].name
        known = about("robustness", given) | {"examples": len(trained[0].test.images)}
        how = (options.attacks, checks, of_checks, baseline, task, known)
        write_robustness_report(folder, rows, *how)
    print(f"wrote {folder / 'report.md'} and {folder / 'report.html'}")


def _differ_in_training(plain: Trained, networks: Trained) -> bool:
    """Returns whether these are other networks, of the same seeds."""
    return networks is not plain and networks.seeds == plain.seeds


if __name__ == "__main__":
    exhaustion.run(main)
