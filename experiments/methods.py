"""The methods by name: what is perturbed how, and which loss is ascended."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import bisam_jax

PerExampleLoss = Callable[[jax.Array, jax.Array], jax.Array]
MeanLoss = Callable[[Any, Any], jax.Array]

# Each method's hyperparameters with their defaults.
DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {},
    "sam": {"rho": 0.05},
    "asam": {"rho": 0.5, "eta": 0.01},
    "bisam-log": {"rho": 0.05},
    "bisam-tanh": {"rho": 0.05},
    "gsam": {"rho": 0.05, "gsam_alpha": 0.4},
    "bilateral": {"rho": 0.05, "rho_min": 0.05},
    "tilted": {
        "rho": 0.05,
        "tilt": 1.0,
        "num_samples": 3,
        "noise_radius": 0.5,
        "noise_scale": 1.0,
    },
    "sparse-fisher": {"rho": 0.05, "sparsity": 0.5, "update_every": 39},
    "sparse-dynamic": {"rho": 0.05, "sparsity": 0.5, "update_every": 39, "drop_rate": 0.5},
    "efficient": {"rho": 0.05, "beta": 0.5, "gamma": 0.5},
    "sampa": {"rho": 0.05, "interpolation": 0.2},
    "friendly": {"rho": 0.05, "sigma": 1.0, "decay": 0.9},
}
# Each ascended loss's hyperparameters with their defaults, which are the paper's.
PERTURBATION_DEFAULTS: dict[str, dict[str, float]] = {
    "ce": {},
    "log": {"mu": 1.0},
    "tanh": {"mu": 10.0, "alpha": 0.1},
}


class Method(NamedTuple):
    """A method with its hyperparameters.

    Attributes:
        transformation: the sharpness-aware step; the identity for plain training, which never
            asks for the second gradient.
        optimizer: the base optimizer; the identity where the transformation contains it.
        perturbation_loss: what is ascended, per example, from logits and labels; the training
            loss if None.
        needs_previous_batch: whether a step is made of two batches.
    """

    transformation: optax.GradientTransformationExtraArgs
    optimizer: optax.GradientTransformation
    perturbation_loss: PerExampleLoss | None = None
    needs_previous_batch: bool = False


def perturbation_of(name: str) -> str | None:
    """The loss that the method's name says is ascended, if it says so."""
    return name.removeprefix("bisam-") if name.startswith("bisam-") else None


def gradients(name: str, perturbation: str, num_samples: int | None = None) -> int:
    """How many gradients of a batch a step takes, those of a part of it counted as whole.

    Args:
        name: one of `DEFAULTS`.
        perturbation: one of `PERTURBATION_DEFAULTS`.
        num_samples: of tilted.
    """
    match name:
        case "sgd":
            return 1
        case "tilted":
            return 2 * (num_samples or int(DEFAULTS[name]["num_samples"]))
        # Beside that of the ascended loss, these need the clean gradient of the training loss.
        case "gsam" | "sampa":
            return 2 + (perturbation != "ce")
        case "bilateral":
            return 3 + (perturbation != "ce")
    return 2


def make(
    name: str,
    perturbation: str,
    optimizer: optax.GradientTransformation,
    hyperparameters: dict[str, Any],
    key: jax.Array | int = 0,
    gradient_axis: str | None = None,
) -> Method:
    """The method `name`, ascending `perturbation`, before the base `optimizer`.

    Args:
        name: one of `DEFAULTS`.
        perturbation: one of `PERTURBATION_DEFAULTS`.
        optimizer: the base optimizer.
        hyperparameters: values for the names in both, possibly traced.
        key: for the methods that draw at random.
        gradient_axis: of the mesh, over which sampa's two gradients lie.
    """
    loss = _perturbation_loss(perturbation, hyperparameters)
    h = hyperparameters
    match name:
        case "sgd":
            # Ascends nothing: what goes through is the gradient of the training loss.
            return Method(optax.with_extra_args_support(optax.identity()), optimizer)
        case "sam" | "bisam-log" | "bisam-tanh":
            transformation = bisam_jax.bisam(h["rho"])
        case "asam":
            transformation = bisam_jax.asam(h["rho"], h["eta"])
        case "gsam":
            transformation = bisam_jax.gsam(h["rho"], h["gsam_alpha"])
        case "bilateral":
            transformation = bisam_jax.bilateral_sam(h["rho"], h["rho_min"])
        case "tilted":
            transformation = bisam_jax.tilted_sam(
                h["rho"], h["tilt"], h["num_samples"], h["noise_radius"], h["noise_scale"], key
            )
        case "sparse-fisher":
            transformation = bisam_jax.sparse_sam_fisher(h["rho"], h["sparsity"], h["update_every"])
        case "sparse-dynamic":
            transformation = bisam_jax.sparse_sam_dynamic(
                h["rho"], h["sparsity"], h["drop_rate"], h["update_every"]
            )
        case "efficient":
            transformation = bisam_jax.efficient_sam(h["rho"], h["beta"], h["gamma"], key)
        case "friendly":
            transformation = bisam_jax.friendly_sam(h["rho"], h["sigma"], h["decay"])
        case "sampa":
            both = bisam_jax.sampa(
                optimizer,
                h["rho"],
                h["interpolation"],
                bilevel=loss is not None,
                gradient_axis=gradient_axis,
            )
            return Method(both, optax.identity(), loss, needs_previous_batch=True)
        case _:
            raise ValueError(f"method must be one of {', '.join(DEFAULTS)}, got {name!r}.")
    return Method(transformation, optimizer, loss)


def _perturbation_loss(name: str, h: dict[str, Any]) -> PerExampleLoss | None:
    match name:
        case "ce":
            return None
        case "log":
            return functools.partial(bisam_jax.perturbation_loss, mu=h["mu"])
        case "tanh":
            bound = functools.partial(bisam_jax.tanh_lower_bound, alpha=h["alpha"])
            return functools.partial(bisam_jax.perturbation_loss, lower_bound=bound, mu=h["mu"])
    names = ", ".join(PERTURBATION_DEFAULTS)
    raise ValueError(f"perturbation must be one of {names}, got {name!r}.")
