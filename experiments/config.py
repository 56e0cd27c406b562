"""The configuration of a run."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from experiments import methods, runs

BASE_DEFAULTS = {
    "sgd": {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"learning_rate": 2e-3, "momentum": None, "weight_decay": 1e-2},
}
_IMAGES = {"model": "resnet20", "epochs": 200, "batch_size": 128, "cutout": 0.0}
_NO_AUGMENTATION = {"crop_padding": 0, "flip": False, "cutout": 0.0}
# What suits the images: a mirrored digit is no digit. Everything else is OTHER_DATASETS.
DATASET_DEFAULTS = {
    "digits": {"model": "mlp", "epochs": 50, "batch_size": 32, **_NO_AUGMENTATION},
    "mnist": {**_IMAGES, "crop_padding": 2, "flip": False},
    "svhn_cropped": {**_IMAGES, "crop_padding": 4, "flip": False},
    "fashion_mnist": {**_IMAGES, "crop_padding": 2, "flip": True},
    "cifar10": {**_IMAGES, "crop_padding": 4, "flip": True},
    "cifar100": {**_IMAGES, "crop_padding": 4, "flip": True},
}
OTHER_DATASETS = {**_IMAGES, "crop_padding": 0, "flip": True}
# Methods whose step needs more than gradients of a batch.
NOT_IN_PARTS = ("efficient", "sparse-fisher", "sampa")

# What says where a run is computed. It changes nothing but the rounding of its numbers, unless
# batch statistics are per device.
PLACES = ("devices", "parallelism", "fsdp")

FLOAT32_MAX = 3.4e38


class ArgumentError(ValueError):
    """An argument that cannot be used; the message names it as the command line does."""


Model = Literal[
    "mlp",
    "cnn",
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet56",
    "wrn16_8",
    "wrn28_2",
    "wrn28_10",
    "densenet121",
    "vgg19_bn",
    "resnet18",
    "resnet50",
    "vit_tiny",
    "vit_small",
]
Method = Literal[
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
]
Number = TypeVar("Number")
Count = TypeVar("Count")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt, by which network and in how many steps."""

    dataset: str = "digits"
    """digits, or an image classification data set of TFDS: cifar10, cifar100, fashion_mnist, ..."""
    data_dir: Path | None = None
    """Where TFDS has prepared it (default: TFDS's own folder)."""
    train_examples: int | None = None
    """Train on so many examples alone (default: all but the validation part)."""
    image_size: int | None = None
    """Height and width for images that are streamed (default 224, where sizes vary)."""
    model: Model | None = None
    """The network (default mlp for digits, else resnet20); mlp, cnn and resnet8 are small."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the model's arithmetic; parameters and statistics are always float32."""
    base: Literal["sgd", "adamw"] = "sgd"
    """The base optimizer, with a cosine schedule to zero."""
    label_smoothing: float = 0.1
    """Share of each label that is spread over the other classes, in the training loss."""

    crop_padding: int | None = None
    """Pixels by which images are shifted at most (default 4 for CIFAR and SVHN, 2 for MNIST
    and Fashion-MNIST, else 0); not if streamed."""
    flip: bool | None = None
    """Whether half of the images are mirrored (default: not if they show digits)."""
    cutout: float | None = None
    """Share of the images that lose a square of 16x16 pixels (default 0)."""

    epochs: int | None = None
    """Passes over the training examples (default 200; digits 50)."""
    batch_size: int | None = None
    """Examples a step (default 128; digits 32); an epoch's incomplete last batch is dropped."""
    group_size: int | None = None
    """m-sharpness: so many examples share a perturbation (default: the batch)."""
    microbatch_size: int | None = None
    """Compute on so many examples at a time, to save memory (default: the batch)."""
    label_noise: float = 0.0
    """Share of the training and validation labels replaced by another class."""
    workers: int | None = None
    """Processes that decode images, if streamed (default: one a CPU, at most 16)."""


@dataclasses.dataclass(frozen=True)
class Hyperparameters(Generic[Number, Count]):
    """Of methods and base optimizers: one value of each, or several to compare.

    None is the default of the method or base optimizer.
    """

    rho: Number | None = None
    """Radius of the perturbation (default 0.05; asam 0.5)."""
    mu: Number | None = None
    """BiSAM: sharpness of the maximum over classes (default 1 for -log, 10 for tanh)."""
    alpha: Number | None = None
    """BiSAM (tanh): slope of the lower bound (default 0.1)."""
    eta: Number | None = None
    """asam: added to each weight's size (default 0.01)."""
    gsam_alpha: Number | None = None
    """gsam: weight of the clean gradient's orthogonal part (default 0.4)."""
    rho_min: Number | None = None
    """bilateral: radius on the downhill side (default 0.05)."""
    tilt: Number | None = None
    """tilted: how far the mean leans towards the worst start (default 1)."""
    num_samples: Count | None = None
    """tilted: number of noisy starts (default 3)."""
    noise_radius: Number | None = None
    """tilted: largest norm of the noise (default 0.5)."""
    noise_scale: Number | None = None
    """tilted: standard deviation of the noise before it is shortened (default 1)."""
    sparsity: Number | None = None
    """sparse-*: share of the weights that are not perturbed (default 0.5)."""
    update_every: Count | None = None
    """sparse-*: steps between changes of the mask (default: an epoch)."""
    drop_rate: Number | None = None
    """sparse-dynamic: share of the mask that moves (default 0.5)."""
    beta: Number | None = None
    """efficient: probability that a weight is perturbed (default 0.5)."""
    gamma: Number | None = None
    """efficient: share of the examples to descend on (default 0.5)."""
    interpolation: Number | None = None
    """sampa: weight of the look-ahead gradient (default 0.2)."""
    sigma: Number | None = None
    """friendly: how much of the running mean is taken away (default 1)."""
    decay: Number | None = None
    """friendly: of the running mean (default 0.9)."""

    learning_rate: Number | None = None
    """Its value before decay (default 0.1; adamw 0.002)."""
    momentum: Number | None = None
    """Of sgd (default 0.9)."""
    weight_decay: Number | None = None
    """In the base optimizer (default 0.0005; adamw 0.01)."""


HYPERPARAMETERS = tuple(field.name for field in dataclasses.fields(Hyperparameters))


@dataclasses.dataclass(frozen=True)
class Config(Hyperparameters[float, int], Task):
    """What one run depends on. None is the default of the method, base optimizer or data set."""

    method: Method = "bisam-log"
    """What is done with the second gradient; sgd has none (with either base optimizer)."""
    perturbation: Literal["ce", "log", "tanh"] | None = None
    """The loss that is ascended: cross-entropy, or BiSAM's (default ce; bisam-*: as it says)."""
    seed: int = 0
    """Of everything random but the split, which is always the same."""
    devices: int | None = None
    """Share a batch over so many devices, of each process (default: all)."""
    parallelism: Literal["jit", "shard_map", "pmap"] = "jit"
    """How: one program for all devices, or one for each."""
    fsdp: int = 1
    """Split parameters and optimizer state over so many of the devices."""
    batch_statistics: Literal["synchronised", "per-device"] = "synchronised"
    """Batch normalisation over the whole batch, or over each device's part (not with jit)."""
    checkpoint_every: int | None = None
    """Steps between checkpoints (default: an epoch; digits: ten). The best epoch is always kept."""
    keep_checkpoints: int = 2
    """So many of the last checkpoints are kept."""
    output: Path | None = None
    """The run folder (default: a new one in runs/)."""

    def __post_init__(self) -> None:
        """Refuses impossible values, by the names of the command line."""
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

    def resolved(self) -> "Config":
        """With defaults filled in, and None where a value has no meaning.

        Raises:
            ArgumentError: if values contradict each other.
        """
        perturbation = methods.perturbation_of(self.method) or self.perturbation or "ce"
        every = (methods.DEFAULTS, methods.PERTURBATION_DEFAULTS)
        names = (name for table in every for defaults in table.values() for name in defaults)
        values: dict[str, Any] = dict.fromkeys(names)
        values |= methods.DEFAULTS[self.method] | BASE_DEFAULTS[self.base]
        if self.method != "sgd":
            values |= methods.PERTURBATION_DEFAULTS[perturbation]
        else:
            perturbation = "ce"
        values |= DATASET_DEFAULTS.get(_base_name(self.dataset), OTHER_DATASETS)

        def value_of(name: str, default: Any) -> Any:
            # A default of None says that the value has no meaning here.
            given = getattr(self, name)
            return default if default is None or given is None else given

        values = {name: value_of(name, default) for name, default in values.items()}
        if values["update_every"] is not None:
            values["update_every"] = self.update_every  # by default, an epoch
        name = f"{_base_name(self.dataset)}-{self.method}-seed{self.seed}"
        config = dataclasses.replace(
            self,
            **values,
            perturbation=perturbation,
            output=self.output or runs.new_folder(name),
            data_dir=self.data_dir and self.data_dir.resolve(),
        )
        config._check_sizes()
        return config

    def with_epochs_of(self, steps: int) -> "Config":
        """With defaults filled in that are a number of epochs of so many steps."""
        values = {"checkpoint_every": steps * (10 if self.dataset == "digits" else 1)}
        if "update_every" in methods.DEFAULTS[self.method]:
            values["update_every"] = steps
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def _check_sizes(self) -> None:
        """Refuses sizes that do not fit each other, once all are known."""
        assert self.batch_size is not None
        if self.method == "efficient" and int(self.batch_size * (self.gamma or 0.5)) < 2:
            raise ArgumentError("--gamma leaves less than 2 examples of --batch-size")
        if self.group_size is not None and self.method == "sgd":
            raise ArgumentError(
                "--group-size has no meaning for --method sgd: nothing is perturbed"
            )
        for name in ("group_size", "microbatch_size"):
            option, size = f"--{name.replace('_', '-')}", getattr(self, name)
            if size is None:
                continue
            if self.method in NOT_IN_PARTS:
                raise ArgumentError(f"{option} cannot be used with --method {self.method}")
            if self.batch_size % size:
                raise ArgumentError(
                    f"{option} must divide --batch-size, got {size} and {self.batch_size}"
                )
        if self.group_size and self.microbatch_size and self.microbatch_size % self.group_size:
            raise ArgumentError(
                f"--microbatch-size must be a multiple of --group-size, got "
                f"{self.microbatch_size} and {self.group_size}"
            )


_RANGES = {
    **dict.fromkeys(("rho", "eta", "learning_rate", "weight_decay", "momentum"), (0, math.inf)),
    **dict.fromkeys(("gsam_alpha", "rho_min", "noise_radius", "noise_scale"), (0, math.inf)),
    **dict.fromkeys(("sparsity", "drop_rate", "interpolation", "decay"), (0, 1)),
    **dict.fromkeys(("num_samples", "update_every"), (1, math.inf)),
    **dict.fromkeys(("epochs", "train_examples", "image_size"), (1, math.inf)),
    **dict.fromkeys(("group_size", "microbatch_size", "batch_size"), (2, math.inf)),
    **dict.fromkeys(("checkpoint_every", "keep_checkpoints", "devices", "fsdp"), (1, math.inf)),
    **dict.fromkeys(("crop_padding", "workers"), (0, math.inf)),
    **dict.fromkeys(("label_noise", "label_smoothing", "cutout"), (0, 1)),
    "seed": (0, 2**32 - 1),
    "sigma": (0, math.inf),
    "tilt": (-math.inf, math.inf),
}


def _base_name(dataset: str) -> str:
    """TFDS's name without configuration and version."""
    return re.split("[/:]", dataset)[0]


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
