"""The only list of methods, with one spec each.

To add a method, add a spec to `METHODS` and its new hyperparameters to `HYPERPARAMETERS`. The
choices of `--method` and the options, defaults, ranges and help of every script come from these.
"""

import collections
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import optax

import bisam_jax
from experiments.config.hyperparameters import HYPERPARAMETERS

# Gradients of an attack on the images of a batch.
ATTACK_STEPS = 10
Number = float | Callable[[Mapping[str, Any]], float]


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """A method, as the scripts know it.

    Attributes:
        factory: makes the transformation. It also gets `key`, `optimizer`, `batch_like`,
            `bilevel` and `gradient_axis`, if it has these arguments.
        options: names of the hyperparameters, each with the name of the factory's argument.
        gradients: number of batch gradients per step on average, or a function of the
            hyperparameters. A gradient of a part of the batch counts as one.
        gradients_with_q: the number if BiSAM's loss is ascended; None if it is the same.
        ascends: the ascended loss, if the method's name fixes it.
        is_case_of: the method that equals this one if it ascends `ascends`.
        is_plain: whether nothing is perturbed or ascended.
        attack: "linf" or "l2" if images are perturbed instead of weights.
        ball: the perturbation, with the factory's arguments, if the method is `sharpness_aware`
            with it. Otherwise the factory may take a `perturbation` in the place of its ball.
        moves_all: whether the method moves all parameters in a way that no perturbation changes.
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
    attack: Literal["linf", "l2"] | None = None
    ball: Callable[..., optax.GradientTransformation] | None = None
    moves_all: bool = False
    contains_optimizer: bool = False
    parallel_gradients: bool = False
    takes_single_examples: bool = False

    @property
    def perturbs_weights(self) -> bool:
        """Whether there is a loss that is ascended over the weights."""
        return not (self.is_plain or self.attack)

    @property
    def defaults(self) -> dict[str, float]:
        """The defaults of the hyperparameters, read from the factory's signature."""
        known = inspect.signature(self.factory).parameters
        return {option: known[argument].default for option, argument in self.options.items()}


def _options(*same: str, **renamed: str) -> dict[str, str]:
    return {name: name for name in same} | renamed


def _adversarial(attack_radius: float = 8.0) -> optax.GradientTransformation:
    """Leaves gradients as they are: the step computes them at attacked images."""
    return optax.identity()


def _attack(norm: Literal["linf", "l2"]) -> MethodSpec:
    return MethodSpec(
        _adversarial, _options("attack_radius"), gradients=1 + ATTACK_STEPS, attack=norm
    )


METHODS: dict[str, MethodSpec] = {
    "sgd": MethodSpec(optax.identity, options={}, gradients=1, is_plain=True),
    "sam": MethodSpec(bisam_jax.sam, ball=bisam_jax.l2_ball),
    "asam": MethodSpec(bisam_jax.asam, _options("rho", "eta"), ball=bisam_jax.adaptive_l2_ball),
    "bisam-log": MethodSpec(
        bisam_jax.bisam, ascends="log", is_case_of="sam", ball=bisam_jax.l2_ball
    ),
    "bisam-tanh": MethodSpec(
        bisam_jax.bisam, ascends="tanh", is_case_of="sam", ball=bisam_jax.l2_ball
    ),
    "gsam": MethodSpec(bisam_jax.gsam, _options("rho", gsam_alpha="alpha"), gradients_with_q=3),
    "bilateral": MethodSpec(
        bisam_jax.bilateral_sam,
        _options("rho_min", rho="rho_max"),
        gradients=3,
        gradients_with_q=4,
        moves_all=True,  # a perturbation replaces both balls, of two radii
    ),
    "tilted": MethodSpec(
        bisam_jax.tilted_sam,
        _options("rho", "tilt", "num_samples", noise_radius="radius", noise_scale="scale"),
        gradients=lambda h: 2 * h["num_samples"],
        moves_all=True,  # by its noise
    ),
    "sparse-fisher": MethodSpec(
        bisam_jax.sparse_sam_fisher,
        _options("rho", "sparsity", "update_every"),
        takes_single_examples=True,
    ),
    "sparse-dynamic": MethodSpec(
        bisam_jax.sparse_sam_dynamic, _options("rho", "sparsity", "update_every", "drop_rate")
    ),
    "efficient": MethodSpec(
        bisam_jax.efficient_sam, _options("rho", "beta", "gamma"), takes_single_examples=True
    ),
    "sampa": MethodSpec(
        bisam_jax.sampa,
        _options("rho", "interpolation"),
        gradients_with_q=3,
        contains_optimizer=True,
        parallel_gradients=True,
    ),
    "friendly": MethodSpec(bisam_jax.friendly_sam, _options("rho", "sigma", "decay")),
    "look": MethodSpec(
        bisam_jax.look_sam,
        _options("rho", look_alpha="alpha", look_every="k"),
        gradients=lambda h: 1 + 1 / h["look_every"],
        gradients_with_q=lambda h: 1 + 2 / h["look_every"],
    ),
    "weighted": MethodSpec(
        bisam_jax.weighted_sam, _options("rho", sharpness_weight="gamma"), gradients_with_q=3
    ),
    "functional": MethodSpec(bisam_jax.functional_sam),
    "adversarial-linf": _attack("linf"),
    "adversarial-l2": _attack("l2"),
}
(PLAIN,) = (name for name, spec in METHODS.items() if spec.is_plain)

# The hyperparameters of each ascended loss, with the paper's defaults.
PERTURBATIONS: dict[str, dict[str, float]] = {
    "ce": {},
    "log": {"mu": 1.0},
    "tanh": {"mu": 10.0, "alpha": 0.1},
}
BASE_OPTIMIZERS: dict[str, dict[str, float]] = {
    "sgd": {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"learning_rate": 2e-3, "weight_decay": 1e-2, "warmup": 0.05},
    "lion": {"learning_rate": 2e-4, "weight_decay": 1e-1, "warmup": 0.05},
    "muon": {"learning_rate": 2e-3, "weight_decay": 1e-2, "warmup": 0.05},
}


def label_of(method: str, perturbation: str) -> str:
    """Returns the unique name of a method and its ascended loss: "sam+log" is bisam-log."""
    if perturbation == "ce" or METHODS[method].ascends is not None:
        return method
    for name, spec in METHODS.items():
        if (spec.is_case_of, spec.ascends) == (method, perturbation):
            return name
    return f"{method}+{perturbation}"


def help_of(hyperparameter: str) -> str:
    """Returns the help of a hyperparameter: its methods, its meaning and its defaults."""
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
    ((common, _),) = collections.Counter(known.values()).most_common(1)
    usual = known.get("sgd", common)  # the usual base optimizer
    others = [f"; {name} {value:g}" for name, value in known.items() if value != usual]
    return f"{text} (default {usual:g}{''.join(others)})."


def gradients(name: str, perturbation: str, hyperparameters: Mapping[str, Any]) -> float:
    """Returns the number of batch gradients of a perturbed step, on average.

    Args:
        name: a key of `METHODS`.
        perturbation: a key of `PERTURBATIONS`.
        hyperparameters: values by name.
    """
    spec = METHODS[name]
    number = (perturbation != "ce" and spec.gradients_with_q) or spec.gradients
    return number(hyperparameters) if callable(number) else number
