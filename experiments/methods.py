"""The methods by name: one table of specs, from which all that scripts know of methods follows.

To add a method, add a spec to `METHODS`, and its new hyperparameters to `HYPERPARAMETERS`. The
choices of `--method`, the options of every script, their defaults, ranges and help come from there.
"""

import collections
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import bisam_jax

PerExampleLoss = Callable[[jax.Array, jax.Array], jax.Array]
Number = float | Callable[[Mapping[str, Any]], float]


class Range(NamedTuple):
    """Finite numbers from `minimum` to `maximum`; `above` and `below` exclude these two."""

    minimum: float = -math.inf
    maximum: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        """Whether a number is in the range."""
        assert isinstance(value, int | float)
        if value in (self.minimum, self.maximum):
            return not (self.above if value == self.minimum else self.below)
        return self.minimum < value < self.maximum

    def __str__(self) -> str:
        """The limits in words."""
        lower = f"{'greater than' if self.above else 'at least'} {self.minimum:g}"
        upper = f" and {'less than' if self.below else 'at most'} {self.maximum:g}"
        return lower + (upper if self.maximum < math.inf else "")


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """A number of a method, an ascended loss or a base optimizer.

    Attributes:
        help: what it is.
        range: which values it can have.
        is_structural: whether it changes the compiled program, so that it cannot be traced.
        is_count: whether it is an integer.
        is_share_of_examples: whether the step is on this share of the examples only.
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
    "noise_scale": Hyperparameter("standard deviation of the noise before the cut", _FROM_ZERO),
    "sparsity": _structural("share of the weights that are not perturbed", _SHARE),
    "update_every": _count("steps between changes of the mask"),
    "drop_rate": _structural("share of the mask that moves", _SHARE),
    "beta": _structural("probability that a weight is perturbed", _POSITIVE_SHARE),
    "gamma": _structural(
        "share of the examples to descend on", _POSITIVE_SHARE, is_share_of_examples=True
    ),
    "interpolation": Hyperparameter("weight of the look-ahead gradient", _SHARE),
    "sigma": Hyperparameter("how much of the running mean is taken away", _FROM_ZERO),
    "decay": Hyperparameter("decay of the running mean", _SHARE),
    "look_alpha": Hyperparameter("weight of the part that is reused", _FROM_ZERO),
    "look_every": _count("steps from one perturbed gradient to the next"),
    "sharpness_weight": Hyperparameter("weight of the sharpness", Range(0, 1, below=True)),
    "learning_rate": Hyperparameter("learning rate before decay", _FROM_ZERO),
    "momentum": Hyperparameter("momentum of sgd", _FROM_ZERO),
    "weight_decay": Hyperparameter("weight decay in the base optimizer", _FROM_ZERO),
}
STRUCTURAL = tuple(name for name, known in HYPERPARAMETERS.items() if known.is_structural)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What scripts know of a method.

    Attributes:
        factory: makes the transformation. What it has of `key`, `optimizer`, `batch_like`,
            `bilevel` and `gradient_axis` among its arguments is passed too.
        options: the hyperparameters, with the names of the factory's arguments.
        gradients: of a batch, that a step takes on average, a part of a batch counted as whole; a
            number, or a function of the hyperparameters.
        gradients_with_q: the same if another loss is ascended; None if that changes nothing.
        ascends: the ascended loss, if the method's name says it.
        is_case_of: the method that this is, with the loss that `ascends` names.
        is_plain: whether nothing is perturbed or ascended.
        contains_optimizer: whether the base optimizer is part of the method.
        parallel_gradients: whether two gradients can lie on two halves of the devices.
        takes_single_examples: whether a step looks at examples one by one.
    """

    factory: Callable[..., Any]
    options: Mapping[str, str] = dataclasses.field(default_factory=lambda: _options("rho"))
    gradients: Number = 2
    gradients_with_q: Number | None = None
    ascends: str | None = None
    is_case_of: str | None = None
    is_plain: bool = False
    contains_optimizer: bool = False
    parallel_gradients: bool = False
    takes_single_examples: bool = False

    @property
    def defaults(self) -> dict[str, float]:
        """The hyperparameters' defaults, which are the factory's own."""
        known = inspect.signature(self.factory).parameters
        return {option: known[argument].default for option, argument in self.options.items()}


def _options(*same: str, **renamed: str) -> dict[str, str]:
    return {name: name for name in same} | renamed


METHODS: dict[str, Spec] = {
    "sgd": Spec(optax.identity, options={}, gradients=1, is_plain=True),
    "sam": Spec(bisam_jax.sam),
    "asam": Spec(bisam_jax.asam, _options("rho", "eta")),
    "bisam-log": Spec(bisam_jax.bisam, ascends="log", is_case_of="sam"),
    "bisam-tanh": Spec(bisam_jax.bisam, ascends="tanh", is_case_of="sam"),
    "gsam": Spec(bisam_jax.gsam, _options("rho", gsam_alpha="alpha"), gradients_with_q=3),
    "bilateral": Spec(
        bisam_jax.bilateral_sam, _options("rho_min", rho="rho_max"), gradients=3, gradients_with_q=4
    ),
    "tilted": Spec(
        bisam_jax.tilted_sam,
        _options("rho", "tilt", "num_samples", noise_radius="radius", noise_scale="scale"),
        gradients=lambda h: 2 * h["num_samples"],
    ),
    "sparse-fisher": Spec(
        bisam_jax.sparse_sam_fisher,
        _options("rho", "sparsity", "update_every"),
        takes_single_examples=True,
    ),
    "sparse-dynamic": Spec(
        bisam_jax.sparse_sam_dynamic, _options("rho", "sparsity", "update_every", "drop_rate")
    ),
    "efficient": Spec(
        bisam_jax.efficient_sam, _options("rho", "beta", "gamma"), takes_single_examples=True
    ),
    "sampa": Spec(
        bisam_jax.sampa,
        _options("rho", "interpolation"),
        gradients_with_q=3,
        contains_optimizer=True,
        parallel_gradients=True,
    ),
    "friendly": Spec(bisam_jax.friendly_sam, _options("rho", "sigma", "decay")),
    "look": Spec(
        bisam_jax.look_sam,
        _options("rho", look_alpha="alpha", look_every="k"),
        gradients=lambda h: 1 + 1 / h["look_every"],
        gradients_with_q=lambda h: 1 + 2 / h["look_every"],
    ),
    "weighted": Spec(
        bisam_jax.weighted_sam, _options("rho", sharpness_weight="gamma"), gradients_with_q=3
    ),
    "functional": Spec(bisam_jax.functional_sam),
}
(PLAIN,) = (name for name, spec in METHODS.items() if spec.is_plain)

# Each ascended loss's hyperparameters with their defaults, which are the paper's.
PERTURBATIONS: dict[str, dict[str, float]] = {
    "ce": {},
    "log": {"mu": 1.0},
    "tanh": {"mu": 10.0, "alpha": 0.1},
}
BASE_OPTIMIZERS: dict[str, dict[str, float]] = {
    "sgd": {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"learning_rate": 2e-3, "weight_decay": 1e-2},
}


class Method(NamedTuple):
    """A method with its hyperparameters.

    Attributes:
        transformation: the sharpness-aware step; the identity for plain training.
        optimizer: the base optimizer; the identity where the transformation contains it.
        perturbation_loss: what is ascended, per example, from logits and labels; the training
            loss if None.
    """

    transformation: optax.GradientTransformation
    optimizer: optax.GradientTransformation
    perturbation_loss: PerExampleLoss | None = None


def help_of(hyperparameter: str) -> str:
    """What the hyperparameter is, of which methods, and its defaults."""
    defaults_of_methods = {name: spec.defaults for name, spec in METHODS.items()}
    for table in (defaults_of_methods, PERTURBATIONS, BASE_OPTIMIZERS):
        known = {
            name: values[hyperparameter]
            for name, values in table.items()
            if hyperparameter in values
        }
        if known:
            break
    text = HYPERPARAMETERS[hyperparameter].help
    few = 2 * len(known) < len(table)
    text = f"{', '.join(known)}: {text}" if few else text[0].upper() + text[1:]
    ((usual, _),) = collections.Counter(known.values()).most_common(1)
    others = [f"; {name} {value:g}" for name, value in known.items() if value != usual]
    return f"{text} (default {usual:g}{''.join(others)})."


def gradients(name: str, perturbation: str, hyperparameters: Mapping[str, Any]) -> float:
    """The gradients of a batch that a step takes on average.

    Args:
        name: one of `METHODS`.
        perturbation: one of `PERTURBATIONS`.
        hyperparameters: values by name.
    """
    spec = METHODS[name]
    number = (perturbation != "ce" and spec.gradients_with_q) or spec.gradients
    return number(hyperparameters) if callable(number) else number


def make(
    name: str,
    perturbation: str,
    optimizer: optax.GradientTransformation,
    hyperparameters: Mapping[str, Any],
    *,
    batch_like: Any = None,
    key: jax.Array | int = 0,
    gradient_axis: str | None = None,
) -> Method:
    """The method `name`, ascending `perturbation`, before the base `optimizer`.

    Args:
        name: one of `METHODS`.
        perturbation: one of `PERTURBATIONS`.
        optimizer: the base optimizer.
        hyperparameters: values for the names in both, possibly traced.
        batch_like: a batch or its shapes, for methods that keep one.
        key: for methods that draw at random.
        gradient_axis: of the mesh, over which parallel gradients lie.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}.")
    spec = METHODS[name]
    loss = None if spec.is_plain else _perturbation_loss(perturbation, hyperparameters)
    offered = {
        "key": key,
        "optimizer": optimizer,
        "batch_like": batch_like,
        "bilevel": loss is not None,
        "gradient_axis": gradient_axis,
    }
    taken = inspect.signature(spec.factory).parameters
    arguments = {argument: value for argument, value in offered.items() if argument in taken}
    for option, argument in spec.options.items():
        arguments[argument] = hyperparameters[option]
    own = optax.identity() if spec.contains_optimizer else optimizer
    return Method(spec.factory(**arguments), own, loss)


def _perturbation_loss(name: str, h: Mapping[str, Any]) -> PerExampleLoss | None:
    match name:
        case "ce":
            return None
        case "log":
            return functools.partial(bisam_jax.perturbation_loss, mu=h["mu"])
        case "tanh":
            bound = functools.partial(bisam_jax.tanh_lower_bound, alpha=h["alpha"])
            return functools.partial(bisam_jax.perturbation_loss, lower_bound=bound, mu=h["mu"])
    raise ValueError(f"perturbation must be one of {', '.join(PERTURBATIONS)}, got {name!r}.")
