"""The options of a run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.config import methods
from experiments.config.hyperparameters import HYPERPARAMETERS, Range
from experiments.config.methods import METHODS
from experiments.data import Source
from experiments.models import ARCHITECTURES
from experiments.system.command_line import ArgumentError

if TYPE_CHECKING:
    ModelName = MethodName = str
else:
    ModelName, MethodName = Literal[tuple(ARCHITECTURES)], Literal[tuple(METHODS)]


def _hyperparameters(several: bool) -> Any:
    """Makes a class with one field per hyperparameter: a value or several. The default is None."""

    def field(name: str, is_count: bool) -> tuple[str, Any, None]:
        number: Any = int if is_count else float
        values = (tuple[number, ...] if several else number) | None
        return name, Annotated[values, tyro.conf.arg(help=methods.help_of(name))], None

    fields = [field(name, known.is_count) for name, known in HYPERPARAMETERS.items()]
    return dataclasses.make_dataclass("Hyperparameters", fields, frozen=True)


Hyperparameters, SeveralHyperparameters = _hyperparameters(False), _hyperparameters(True)


@dataclasses.dataclass(frozen=True)
class Task:
    """The data, the network, and the steps of training."""

    dataset: str = "digits"
    """digits, or an image classification data set of TFDS: cifar10, cifar100, fashion_mnist, ..."""
    data_dir: Path | None = None
    """The folder that TFDS prepared the data set in (default: TFDS's own)."""
    train_examples: int | None = None
    """Number of training examples (default: all but the validation part)."""
    image_size: int | None = None
    """Height and width of streamed images (default: 224 if sizes vary)."""
    model: ModelName | None = None
    """The network (default: mlp for digits, else resnet20). Small: mlp, cnn, resnet8."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model's arithmetic. Parameters and statistics are always float32."""
    base: Literal["sgd", "adamw"] = "sgd"
    """The base optimizer, with a cosine schedule to zero."""
    label_smoothing: float = 0.1
    """Share of each label that the training loss spreads over the other classes."""

    crop_padding: int | None = None
    """Largest random shift in pixels (default: CIFAR and SVHN 4, (Fashion-)MNIST 2, else 0).
    Not for streamed images."""
    flip: bool | None = None
    """Mirror half of the images (default: yes, unless they show digits)."""
    cutout: float | None = None
    """Share of the images that lose a square of 16x16 pixels (default: 0)."""

    epochs: int | None = None
    """Passes over the training examples (default: 200; digits 50)."""
    batch_size: int | None = None
    """Examples per step (default: 128; digits 32). An epoch drops its incomplete last batch."""
    group_size: int | None = None
    """m-sharpness: number of examples that share a perturbation (default: the batch)."""
    microbatch_size: int | None = None
    """Number of examples computed at a time, to save memory (default: the batch)."""
    start_step: int = 0
    """Perturb from this step on. Earlier steps are plain and cost one gradient."""
    every: int = 1
    """From then on, perturb every N-th step. The other steps are plain."""
    label_noise: float = 0.0
    """Share of the training and validation labels replaced by another class."""
    workers: int | None = None
    """Number of processes that decode streamed images (default: one per CPU, at most 16)."""

    def source(self, seed: int) -> Source:
        """Returns the request for the data set, with the seed of the label noise."""
        which = (self.dataset, self.train_examples, self.label_noise, seed, self.image_size)
        return Source(*which, data_dir=self.data_dir, workers=self.workers)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is computed. It changes only the rounding of the numbers.

    The exception is batch normalization with statistics per device.
    """

    devices: int | None = None
    """Number of devices per process that share a batch (default: all)."""
    parallelism: Literal["jit", "shard_map", "pmap"] = "jit"
    """How they share it: one program for all devices (jit), or one for each."""
    fsdp: int = 1
    """Number of devices over which parameters and optimizer state are split."""


@dataclasses.dataclass(frozen=True)
class Config(Place, Hyperparameters, Task):
    """The options of one run. None stands for the default of the method, optimizer or data set."""

    method: MethodName = "bisam-log"
    """The sharpness-aware method; sgd is plain training, with either base optimizer."""
    perturbation: Literal["ce", "log", "tanh"] | None = None
    """The ascended loss: cross-entropy, or BiSAM's (default: ce; bisam-*: as the name says)."""
    seed: int = 0
    """Random seed. The data split does not depend on it."""
    batch_statistics: Literal["synchronised", "per-device"] = "synchronised"
    """Batch normalization over the whole batch, or over each device's part (not with jit)."""
    checkpoint_every: int | None = None
    """Steps between checkpoints (default: 1 epoch; digits: 10). The best epoch is always kept."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep."""
    output: Path | None = None
    """The run folder (default: a new one in runs/)."""

    def __post_init__(self) -> None:
        """Refuses values out of range. Messages name the options."""
        ranges = {name: known.range for name, known in HYPERPARAMETERS.items()}
        check_ranges(self, _RANGES | ranges)
        spec = METHODS[self.method]
        if spec.ascends is not None and self.perturbation not in (None, spec.ascends):
            raise ArgumentError(
                f"--perturbation {self.perturbation} contradicts --method {self.method}: use "
                f"--method {spec.is_case_of} with it"
            )


_RANGES = {
    **dict.fromkeys(("epochs", "train_examples", "image_size", "every"), Range(1)),
    **dict.fromkeys(("group_size", "microbatch_size", "batch_size"), Range(2)),
    **dict.fromkeys(("checkpoint_every", "keep_checkpoints", "devices", "fsdp"), Range(1)),
    **dict.fromkeys(("crop_padding", "workers", "start_step"), Range(0)),
    **dict.fromkeys(("label_noise", "label_smoothing", "cutout"), Range(0, 1)),
    "seed": Range(0, 2**32 - 1),
}


def option_of(name: str) -> str:
    """Returns a field's name as it is typed on the command line."""
    return f"--{name.replace('_', '-')}"


def check_ranges(options: Any, ranges: Mapping[str, Range]) -> None:
    """Raises ArgumentError if a field that is set is outside its range."""
    for name, allowed in ranges.items():
        value = getattr(options, name)
        if value is not None and value not in allowed:
            raise ArgumentError(f"{option_of(name)} must be finite, {allowed}, got {value}")
