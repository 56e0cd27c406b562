"""Checks that an attack is not weak because gradients are masked.

References:
    Athalye et al., `Obfuscated Gradients Give a False Sense of Security
    <https://arxiv.org/abs/1802.00420>`_, 2018; Carlini et al., `On Evaluating Adversarial
    Robustness <https://arxiv.org/abs/1902.06705>`_, 2019
"""

from collections.abc import Sequence

import numpy as np

from experiments.measures.attacks import WORST, Attack, Attacker, usual_attack
from experiments.measures.robustness_report import Check, Robust, rows_of_accuracies
from experiments.step.attack import LEVELS

_LARGE_RADII = (8.0, 32.0, 128.0)
_MULTIPLES = (1, 2, 4)
# Random starts move an accuracy a little, and half a point cannot hide a mask.
_TOLERANCE = 0.005


def checked(
    network: str,
    seeds: Sequence[int],
    attacker: Attacker,
    attack: Attack,
    plain: tuple[str, Attacker] | None,
) -> tuple[list[Check], list[Robust]]:
    """Checks the attacks on some networks.

    Args:
        network: name of the networks.
        seeds: their seeds.
        attacker: attacks them.
        attack: the l-infinity attack that is checked.
        plain: name and attacker of plainly trained networks of the same seeds; None if there are
            none, or if `network` is trained plainly.

    Returns:
        The checks, and all accuracies that they need.
    """
    rows: list[Robust] = []

    def worst(asked: Attack, source: tuple[str, Attacker] | None = None) -> float:
        found = attacker.accuracies(asked, source and source[1])
        rows.extend(rows_of_accuracies(network, seeds, found, asked, source[0] if source else ""))
        return float(found[WORST].mean())

    attack = attack._replace(restarts=1)
    radii = [attack.radius, *(radius for radius in _LARGE_RADII if radius > attack.radius)]
    larger = [worst(usual_attack("linf", radius, steps=20, restarts=1)) for radius in radii]
    counts = [attack.steps * multiple for multiple in _MULTIPLES]
    longer = [worst(attack._replace(steps=steps)) for steps in counts]
    found = [
        Check(
            "accuracy falls to 0 as the radius grows",
            network,
            ", ".join(
                f"{radius:g}/{LEVELS}: {100 * accuracy:.1f} %"
                for radius, accuracy in zip(radii, larger, strict=True)
            ),
            larger[-1] == 0 and bool(np.all(np.diff(larger) <= _TOLERANCE)),
        ),
        Check(
            "more steps do not help the network",
            network,
            ", ".join(
                f"{steps} steps: {100 * accuracy:.2f} %"
                for steps, accuracy in zip(counts, longer, strict=True)
            ),
            max(longer[1:]) <= longer[0] + _TOLERANCE,
        ),
    ]
    name = "an attack computed against plain networks is not stronger"
    if plain is None:
        return [*found, Check(name, network, "no other plain networks of these seeds", None)], rows
    transferred = worst(attack, plain)
    numbers = f"from {plain[0]}: {100 * transferred:.2f} %, own: {100 * longer[0]:.2f} %"
    return [*found, Check(name, network, numbers, transferred >= longer[0])], rows
