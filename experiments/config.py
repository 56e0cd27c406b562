"""The configuration of a run."""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments import methods, runs
from experiments.methods import BASE_OPTIMIZERS, METHODS, PERTURBATIONS, Range

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
# What has no meaning where nothing is perturbed, with the values that say nothing.
OF_PERTURBATIONS = {"group_size": None, "start_step": 0, "every": 1}

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
    start_step: int = 0
    """Perturb from this step on; the steps before it are plain, and cost one gradient."""
    every: int = 1
    """From then on, perturb every so many steps; the others are plain."""
    label_noise: float = 0.0
    """Share of the training and validation labels replaced by another class."""
    workers: int | None = None
    """Processes that decode images, if streamed (default: one a CPU, at most 16)."""


HYPERPARAMETERS = tuple(methods.HYPERPARAMETERS)

if TYPE_CHECKING:
    Method = str

    class Hyperparameters:
        """Those of the table, which type checkers do not read."""

        def __getattr__(self, name: str) -> Any: ...

    SeveralHyperparameters = Hyperparameters
else:
    Method = Literal[tuple(METHODS)]

    def _hyperparameters(several: bool) -> type:
        """A class with a field for each: a value, or several; None is the default."""

        def field(name: str, is_count: bool) -> tuple[str, Any, None]:
            number = int if is_count else float
            values = (tuple[number, ...] if several else number) | None
            return name, Annotated[values, tyro.conf.arg(help=methods.help_of(name))], None

        fields = [field(name, known.is_count) for name, known in methods.HYPERPARAMETERS.items()]
        return dataclasses.make_dataclass("Hyperparameters", fields, frozen=True)

    Hyperparameters, SeveralHyperparameters = _hyperparameters(False), _hyperparameters(True)


@dataclasses.dataclass(frozen=True)
class Config(Hyperparameters, Task):
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
        ranges = {name: known.range for name, known in methods.HYPERPARAMETERS.items()}
        for name, range_ in (_RANGES | ranges).items():
            _check(f"--{name.replace('_', '-')}", getattr(self, name), range_)
        spec = METHODS[self.method]
        if spec.ascends is not None and self.perturbation not in (None, spec.ascends):
            raise ArgumentError(
                f"--perturbation {self.perturbation} contradicts --method {self.method}: use "
                f"--method {spec.is_case_of} with it"
            )

    def resolved(self) -> "Config":
        """With defaults filled in, and None where a value has no meaning.

        Raises:
            ArgumentError: if values contradict each other.
        """
        spec = METHODS[self.method]
        perturbation = spec.ascends or self.perturbation or "ce"
        if spec.is_plain:
            perturbation = "ce"
        values: dict[str, Any] = dict.fromkeys(HYPERPARAMETERS)
        values |= spec.defaults | PERTURBATIONS[perturbation] | BASE_OPTIMIZERS[self.base]
        values |= DATASET_DEFAULTS.get(_base_name(self.dataset), OTHER_DATASETS)

        def value_of(name: str, default: Any) -> Any:
            # A default of None says that the value has no meaning here.
            given = getattr(self, name)
            return default if default is None or given is None else given

        values = {name: value_of(name, default) for name, default in values.items()}
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
        if self.checkpoint_every is not None:
            return self
        epochs = 10 if self.dataset == "digits" else 1
        return dataclasses.replace(self, checkpoint_every=steps * epochs)

    def examples_left(self, examples: int) -> dict[str, int]:
        """How many of some examples a step is on, by the hyperparameter that says so."""
        shares = {
            name: getattr(self, name)
            for name, known in methods.HYPERPARAMETERS.items()
            if known.is_share_of_examples
        }
        # A product of 6.999999 is meant as 7.
        return {
            name: int(examples * share + 1e-6)
            for name, share in shares.items()
            if share is not None
        }

    def _check_sizes(self) -> None:
        """Refuses sizes that do not fit each other, once all are known."""
        assert self.batch_size is not None
        self._check_perturbed()
        for name in ("group_size", "microbatch_size"):
            option, size = f"--{name.replace('_', '-')}", getattr(self, name)
            if size is not None and self.batch_size % size:
                raise ArgumentError(
                    f"{option} must divide --batch-size, got {size} and {self.batch_size}"
                )
        whole = "--batch-size" if self.group_size is None else "--group-size"
        for name, left in self.examples_left(self.group_size or self.batch_size).items():
            if left < 2:
                raise ArgumentError(f"--{name} leaves less than 2 examples of {whole}")
        if self.group_size and self.microbatch_size and self.microbatch_size % self.group_size:
            raise ArgumentError(
                f"--microbatch-size must be a multiple of --group-size, got "
                f"{self.microbatch_size} and {self.group_size}"
            )

    def _check_perturbed(self) -> None:
        """Refuses options that the method cannot follow."""
        spec = METHODS[self.method]
        for name, nothing in OF_PERTURBATIONS.items():
            option = f"--{name.replace('_', '-')}"
            if getattr(self, name) == nothing:
                continue
            if spec.is_plain:
                raise ArgumentError(
                    f"{option} has no meaning for --method {self.method}: nothing is perturbed"
                )
            if spec.contains_optimizer:
                raise ArgumentError(
                    f"{option} cannot be used with --method {self.method}, which contains the "
                    "base optimizer: its steps are whole updates, not gradients"
                )


_RANGES = {
    **dict.fromkeys(("epochs", "train_examples", "image_size", "every"), Range(1)),
    **dict.fromkeys(("group_size", "microbatch_size", "batch_size"), Range(2)),
    **dict.fromkeys(("checkpoint_every", "keep_checkpoints", "devices", "fsdp"), Range(1)),
    **dict.fromkeys(("crop_padding", "workers", "start_step"), Range(0)),
    **dict.fromkeys(("label_noise", "label_smoothing", "cutout"), Range(0, 1)),
    "seed": Range(0, 2**32 - 1),
}


def _base_name(dataset: str) -> str:
    """TFDS's name without configuration and version."""
    return re.split("[/:]", dataset)[0]


def _check(option: str, value: float | None, range_: Range) -> None:
    if value is not None and not (abs(value) < FLOAT32_MAX and value in range_):
        raise ArgumentError(f"{option} must be finite, {range_}, got {value}")
