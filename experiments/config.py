"""The configuration of a run."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from experiments import methods, runs

BASE_DEFAULTS = {
    "sgd": {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"learning_rate": 2e-3, "momentum": None, "weight_decay": 1e-2},
}


FLOAT32_MAX = 3.4e38


class ArgumentError(ValueError):
    """An argument that cannot be used; the message names it as the command line does."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What one run depends on. None is the default of the method or of the base optimizer."""

    method: Literal[
        "sgd",
        "sam",
        "asam",
        "bisam-log",
        "bisam-tanh",
        "gsam",
        "bilateral",
        "tilted",
        "sparse-fisher",
        "sparse-dynamic",
        "efficient",
        "sampa",
        "friendly",
    ] = "bisam-log"
    """What is done with the second gradient; sgd has none (with either base optimizer)."""
    perturbation: Literal["ce", "log", "tanh"] | None = None
    """The loss that is ascended: cross-entropy, or BiSAM's (default ce; bisam-*: as it says)."""
    model: Literal["mlp", "cnn"] = "mlp"
    """Perceptron or convolutional network, both with batch normalisation."""

    rho: float | None = None
    """Radius of the perturbation (default 0.05; asam 0.5)."""
    mu: float | None = None
    """BiSAM: sharpness of the maximum over classes (default 1 for -log, 10 for tanh)."""
    alpha: float | None = None
    """BiSAM (tanh): slope of the lower bound (default 0.1)."""
    eta: float | None = None
    """asam: added to each weight's size (default 0.01)."""
    gsam_alpha: float | None = None
    """gsam: weight of the clean gradient's orthogonal part (default 0.4)."""
    rho_min: float | None = None
    """bilateral: radius on the downhill side (default 0.05)."""
    tilt: float | None = None
    """tilted: how far the mean leans towards the worst start (default 1)."""
    num_samples: int | None = None
    """tilted: number of noisy starts (default 3)."""
    noise_radius: float | None = None
    """tilted: largest norm of the noise (default 0.5)."""
    noise_scale: float | None = None
    """tilted: standard deviation of the noise before it is shortened (default 1)."""
    sparsity: float | None = None
    """sparse-*: share of the weights that are not perturbed (default 0.5)."""
    update_every: int | None = None
    """sparse-*: steps between changes of the mask (default 39, an epoch of the default batch)."""
    drop_rate: float | None = None
    """sparse-dynamic: share of the mask that moves (default 0.5)."""
    beta: float | None = None
    """efficient: probability that a weight is perturbed (default 0.5)."""
    gamma: float | None = None
    """efficient: share of the examples to descend on (default 0.5)."""
    interpolation: float | None = None
    """sampa: weight of the look-ahead gradient (default 0.2)."""
    sigma: float | None = None
    """friendly: how much of the running mean is taken away (default 1)."""
    decay: float | None = None
    """friendly: of the running mean (default 0.9)."""

    base: Literal["sgd", "adamw"] = "sgd"
    """The base optimizer, with a cosine schedule to zero."""
    learning_rate: float | None = None
    """Its value before decay (default 0.1; adamw 0.002)."""
    momentum: float | None = None
    """Of sgd (default 0.9)."""
    weight_decay: float | None = None
    """In the base optimizer (default 0.0005; adamw 0.01)."""
    label_smoothing: float = 0.1
    """Share of each label that is spread over the other classes, in the training loss."""

    epochs: int = 50
    """Passes over the training examples."""
    batch_size: int = 32
    """Examples a step; the incomplete last batch of an epoch is dropped."""
    seed: int = 0
    """Of initialisation, order of examples and label noise; the split is always the same."""
    label_noise: float = 0.0
    """Share of the training and validation labels replaced by another class."""
    output: Path | None = None
    """The run folder (default: a new one in runs/)."""

    def __post_init__(self) -> None:
        """Refuses impossible values, by the names of the command line."""
        _check("--epochs", self.epochs, 1)
        _check("--batch-size", self.batch_size, 2)
        _check("--seed", self.seed, 0, 2**32 - 1)
        _check("--label-noise", self.label_noise, 0, 1)
        _check("--label-smoothing", self.label_smoothing, 0, 1)
        for name, (minimum, maximum) in _RANGES.items():
            _check(f"--{name.replace('_', '-')}", getattr(self, name), minimum, maximum)
        for name, maximum in (("mu", math.inf), ("alpha", math.inf), ("beta", 1), ("gamma", 1)):
            _check(f"--{name}", getattr(self, name), 0, maximum, exclusive=True)
        said = methods.perturbation_of(self.method)
        if said is not None and self.perturbation not in (None, said):
            raise ArgumentError(
                f"--perturbation {self.perturbation} contradicts --method {self.method}: use "
                "--method sam with it"
            )
        if self.method == "efficient" and int(self.batch_size * (self.gamma or 0.5)) < 2:
            raise ArgumentError("--gamma leaves less than 2 examples of --batch-size")

    def resolved(self) -> "Config":
        """With defaults filled in, and None where a value has no meaning."""
        perturbation = methods.perturbation_of(self.method) or self.perturbation or "ce"
        every = (methods.DEFAULTS, methods.PERTURBATION_DEFAULTS)
        names = (name for table in every for defaults in table.values() for name in defaults)
        values: dict[str, Any] = dict.fromkeys(names)
        values |= methods.DEFAULTS[self.method] | BASE_DEFAULTS[self.base]
        if self.method != "sgd":
            values |= methods.PERTURBATION_DEFAULTS[perturbation]
        else:
            perturbation = "ce"
        given = {name: getattr(self, name) for name in values}
        values = {
            name: default if default is None or given[name] is None else given[name]
            for name, default in values.items()
        }
        output = self.output or runs.new_folder(f"digits-{self.method}")
        return dataclasses.replace(self, **values, perturbation=perturbation, output=output)


_RANGES = {
    **dict.fromkeys(("rho", "eta", "learning_rate", "weight_decay", "momentum"), (0, math.inf)),
    **dict.fromkeys(("gsam_alpha", "rho_min", "noise_radius", "noise_scale"), (0, math.inf)),
    **dict.fromkeys(("sparsity", "drop_rate", "interpolation", "decay"), (0, 1)),
    **dict.fromkeys(("num_samples", "update_every"), (1, math.inf)),
    "sigma": (0, math.inf),
    "tilt": (-math.inf, math.inf),
}


def _check(
    name: str,
    value: float | None,
    minimum: float,
    maximum: float = math.inf,
    *,
    exclusive: bool = False,
) -> None:
    if value is None:
        return
    too_small = value <= minimum if exclusive else value < minimum
    if not abs(value) < FLOAT32_MAX or too_small or value > maximum:
        upper = f" and at most {maximum:g}" if maximum < math.inf else ""
        lower = f"greater than {minimum:g}" if exclusive else f"at least {minimum:g}"
        raise ArgumentError(f"{name} must be finite, {lower}{upper}, got {value}")
