"""The base optimizer and the method before it, made from names and hyperparameters."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import bisam_jax
from experiments.config.methods import METHODS, PERTURBATIONS

PerExampleLoss = Callable[[jax.Array, jax.Array], jax.Array]


class BuiltMethod(NamedTuple):
    """A method with its hyperparameters.

    Attributes:
        transformation: the sharpness-aware step; the identity for plain training.
        optimizer: the base optimizer; the identity if the transformation contains it.
        perturbation_loss: the ascended loss per example, from logits and labels; None for the
            training loss.
    """

    transformation: optax.GradientTransformation
    optimizer: optax.GradientTransformation
    perturbation_loss: PerExampleLoss | None = None


def learning_rate(hyperparameters: Mapping[str, Any], total_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: a cosine from its first value to zero."""
    return optax.cosine_decay_schedule(hyperparameters["learning_rate"], total_steps)


def base_optimizer(
    name: str, hyperparameters: Mapping[str, Any], total_steps: int
) -> optax.GradientTransformation:
    """Returns the base optimizer with a cosine schedule to zero.

    Args:
        name: a key of `BASE_OPTIMIZERS`.
        hyperparameters: values by name, possibly traced.
        total_steps: length of the schedule.
    """
    schedule = learning_rate(hyperparameters, total_steps)
    if name == "adamw":
        return optax.adamw(schedule, weight_decay=hyperparameters["weight_decay"])
    return optax.chain(
        optax.add_decayed_weights(hyperparameters["weight_decay"]),
        optax.sgd(schedule, momentum=hyperparameters["momentum"]),
    )


def build_method(
    name: str,
    perturbation: str,
    optimizer: optax.GradientTransformation,
    hyperparameters: Mapping[str, Any],
    *,
    batch_like: Any = None,
    key: jax.Array | int = 0,
    gradient_axis: str | None = None,
) -> BuiltMethod:
    """Returns the method `name`, ascending `perturbation`, before the base `optimizer`.

    Args:
        name: a key of `METHODS`.
        perturbation: a key of `PERTURBATIONS`.
        optimizer: the base optimizer.
        hyperparameters: values by name, possibly traced.
        batch_like: a batch or its shapes, for methods that keep one.
        key: random key, for methods that draw.
        gradient_axis: mesh axis over which two parallel gradients lie.
    """
    spec = METHODS[name]
    loss = None if not spec.perturbs_weights else _perturbation_loss(perturbation, hyperparameters)
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
    return BuiltMethod(spec.factory(**arguments), own, loss)


def _perturbation_loss(name: str, h: Mapping[str, Any]) -> PerExampleLoss | None:
    match name:
        case "ce":
            return None
        case "log":
            return functools.partial(bisam_jax.perturbation_loss, mu=h["mu"])
        case "tanh":
            bound = functools.partial(bisam_jax.tanh_lower_bound, alpha=h["alpha"])
            return functools.partial(bisam_jax.perturbation_loss, lower_bound=bound, mu=h["mu"])
    raise ValueError(f"perturbation must be one of {', '.join(PERTURBATIONS)}, got {name!r}")
