"""The methods by name: what is perturbed how, and which loss is ascended."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import bisam_jax

PerExampleLoss = Callable[[jax.Array, jax.Array], jax.Array]


class Method(NamedTuple):
    """A method with its hyperparameters.

    Attributes:
        transformation: the sharpness-aware step; the identity for plain training, which never
            asks for the second gradient.
        perturbation_loss: what is ascended, per example, from logits and labels; the training
            loss if None.
    """

    transformation: optax.GradientTransformationExtraArgs
    perturbation_loss: PerExampleLoss | None = None


# Each method's hyperparameters with their defaults, which are the papers' (for -log and tanh,
# those of CIFAR-10).
DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {},
    "sam": {"rho": 0.05},
    "asam": {"rho": 0.5, "eta": 0.01},
    "bisam-log": {"rho": 0.05, "mu": 1.0},
    "bisam-tanh": {"rho": 0.05, "mu": 10.0, "alpha": 0.1},
}


def make(name: str, **hyperparameters: Any) -> Method:
    """The method of this name; `hyperparameters` are those of :data:`DEFAULTS`, possibly traced."""
    match name:
        case "sgd":
            return Method(optax.with_extra_args_support(optax.identity()))
        case "sam":
            return Method(bisam_jax.sam(**hyperparameters))
        case "asam":
            return Method(bisam_jax.asam(**hyperparameters))
        case "bisam-log":
            loss = functools.partial(bisam_jax.perturbation_loss, mu=hyperparameters["mu"])
        case "bisam-tanh":
            loss = functools.partial(
                bisam_jax.perturbation_loss,
                lower_bound=functools.partial(
                    bisam_jax.tanh_lower_bound, alpha=hyperparameters["alpha"]
                ),
                mu=hyperparameters["mu"],
            )
        case _:
            raise ValueError(f"method must be one of {', '.join(DEFAULTS)}, got {name!r}.")
    return Method(bisam_jax.bisam(hyperparameters["rho"]), loss)
