"""The numbers that a user can set: their ranges and their help."""

import dataclasses
import functools
import math

FLOAT32_MAX = 3.4e38


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from `minimum` to `maximum`; `above` and `below` exclude the limits."""

    minimum: float = -math.inf
    maximum: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """Returns whether a number is in the range and finite in float32."""
        high_enough = value > self.minimum if self.above else value >= self.minimum
        low_enough = value < self.maximum if self.below else value <= self.maximum
        return high_enough and low_enough and abs(value) < FLOAT32_MAX

    def __str__(self) -> str:
        """Says the limits in words."""
        lower = f"{'greater than' if self.above else 'at least'} {self.minimum:g}"
        upper = f" and {'less than' if self.below else 'at most'} {self.maximum:g}"
        return lower + (upper if self.maximum < math.inf else "")


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """A number of a method, of an ascended loss or of a base optimizer.

    Attributes:
        help: one phrase for `--help`.
        range: the allowed values.
        is_structural: whether it changes the compiled program. It then cannot be traced.
        is_count: whether it is an integer.
        is_share_of_examples: whether the step descends on only this share of the examples.
    """

    help: str
    range: Range
    is_structural: bool = False
    is_count: bool = False
    is_share_of_examples: bool = False


_FROM_ZERO, _POSITIVE = Range(0), Range(0, above=True)
_SHARE, _POSITIVE_SHARE = Range(0, 1), Range(0, 1, above=True)
_structural = functools.partial(Hyperparameter, is_structural=True)
_count = functools.partial(_structural, range=Range(1), is_count=True)

HYPERPARAMETERS = {
    "rho": Hyperparameter("radius of the perturbation", _FROM_ZERO),
    "mu": Hyperparameter("BiSAM: sharpness of the maximum over classes", _POSITIVE),
    "alpha": Hyperparameter("slope of the lower bound", _POSITIVE),
    "eta": Hyperparameter("added to each weight's size", _FROM_ZERO),
    "gsam_alpha": Hyperparameter("weight of the clean gradient's orthogonal part", _FROM_ZERO),
    "rho_min": Hyperparameter("radius on the downhill side", _FROM_ZERO),
    "tilt": Hyperparameter("how far the mean leans towards the worst start", Range()),
    "num_samples": _count("number of noisy starts"),
    "noise_radius": Hyperparameter("largest norm of the noise", _FROM_ZERO),
    "noise_scale": Hyperparameter("standard deviation of the noise before shortening", _FROM_ZERO),
    "sparsity": _structural("share of the weights that are not perturbed", _SHARE),
    "update_every": _count("steps between changes of the mask"),
    "drop_rate": _structural("share of the mask that moves", _SHARE),
    "beta": _structural("probability that a weight is perturbed", _POSITIVE_SHARE),
    "gamma": _structural(
        "share of the examples to descend on", _POSITIVE_SHARE, is_share_of_examples=True
    ),
    "interpolation": Hyperparameter("weight of the look-ahead gradient", _SHARE),
    "sigma": Hyperparameter("multiple of the running mean to subtract", _FROM_ZERO),
    "decay": Hyperparameter("decay of the running mean", _SHARE),
    "look_alpha": Hyperparameter("weight of the part that is reused", _FROM_ZERO),
    "look_every": _count("steps from one perturbed gradient to the next"),
    "sharpness_weight": Hyperparameter("weight of the sharpness", Range(0, 1, below=True)),
    "attack_radius": Hyperparameter(
        "radius of the attack on the images, in units of 1/255", _FROM_ZERO
    ),
    "learning_rate": Hyperparameter("learning rate before decay", _FROM_ZERO),
    "warmup": _structural(
        "share of the steps in which the learning rate grows from zero", Range(0, 1, below=True)
    ),
    "momentum": Hyperparameter("momentum of sgd", _FROM_ZERO),
    "weight_decay": Hyperparameter("weight decay in the base optimizer", _FROM_ZERO),
}
STRUCTURAL = tuple(name for name, known in HYPERPARAMETERS.items() if known.is_structural)
