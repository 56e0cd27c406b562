"""The base optimizer and the method before it, made from names and hyperparameters."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import bisam_jax
from experiments.config.methods import BASE_OPTIMIZERS, METHODS, PERTURBATIONS, MethodSpec
from experiments.step.leaves import PERTURBED, Where, are_matrices, muon_dimensions

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
    """Returns the learning rate by step: a cosine from its first value to zero.

    With a warm-up, it first grows linearly from zero.
    """
    first = hyperparameters["learning_rate"]  # possibly traced
    growing = min(round(hyperparameters.get("warmup", 0) * total_steps), total_steps - 1)
    falling = optax.cosine_decay_schedule(first, total_steps - growing)
    if growing == 0:
        return falling
    return optax.join_schedules([optax.linear_schedule(0.0, first, growing), falling], [growing])


def base_optimizer(
    name: str, hyperparameters: Mapping[str, Any], total_steps: int
) -> optax.GradientTransformation:
    """Returns the base optimizer with its learning rate by step.

    Args:
        name: a key of `BASE_OPTIMIZERS`.
        hyperparameters: values by name, possibly traced.
        total_steps: length of the schedule.
    """
    schedule, decay = learning_rate(hyperparameters, total_steps), hyperparameters["weight_decay"]
    match name:
        case "sgd":
            return optax.chain(
                optax.add_decayed_weights(decay),
                optax.sgd(schedule, momentum=hyperparameters["momentum"]),
            )
        case "adamw":
            return optax.adamw(schedule, weight_decay=decay, mask=are_matrices)
        case "lion":
            return optax.lion(schedule, weight_decay=decay, mask=are_matrices)
        case "muon":
            return optax.contrib.muon(
                schedule, weight_decay=decay, muon_weight_dimension_numbers=muon_dimensions
            )
    raise ValueError(f"base must be one of {', '.join(BASE_OPTIMIZERS)}, got {name!r}")


def build_method(
    name: str,
    perturbation: str,
    optimizer: optax.GradientTransformation,
    hyperparameters: Mapping[str, Any],
    *,
    batch_like: Any = None,
    key: jax.Array | int = 0,
    gradient_axis: str | None = None,
    perturb: str = "all",
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
        perturb: which parameters are perturbed: "all" or a key of `PERTURBED`.
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
    if perturb == "all":
        return BuiltMethod(spec.factory(**arguments), own, loss)
    return BuiltMethod(_perturbing(spec, arguments, PERTURBED[perturb]), own, loss)


def _perturbing(
    spec: MethodSpec, arguments: dict[str, Any], where: Where
) -> optax.GradientTransformation:
    """Returns a method that perturbs only some leaves. The ball is that of these leaves."""

    def others(params: Any) -> Any:
        return jax.tree.map(lambda chosen: not chosen, where(params))

    def only(ball: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(optax.masked(optax.set_to_zero(), others), ball)

    if spec.ball is not None:
        return bisam_jax.sharpness_aware(only(spec.ball(**arguments)))
    ball = bisam_jax.l2_ball(arguments.pop("rho"))
    return spec.factory(**arguments, perturbation=only(ball))


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
