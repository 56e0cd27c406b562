"""The options of a run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.config import methods
from experiments.config.hyperparameters import HYPERPARAMETERS, Range
from experiments.config.methods import METHODS
from experiments.data import Source, dataset_spec, is_path
from experiments.models import ARCHITECTURES, architecture
from experiments.system.command_line import ArgumentError, OrDefault, preset_value

# In the folder of a run on texts.
TOKENIZER = "tokenizer.json"
# Hyperparameters that may change when a run is resumed: they save a run that diverges.
CHANGEABLE = ("learning_rate", "rho")

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


def _hyperparameters(several: bool) -> Any:
    """Makes a class with one field per hyperparameter: a value or several. The default is None."""

    def field(name: str, is_count: bool) -> tuple[str, Any, None]:
        number: Any = int if is_count else float
        values = (tuple[number, ...] if several else number) | None
        shown = tyro.conf.arg(help=methods.help_of(name), help_behavior_hint=preset_value)
        return name, Annotated[values, shown], None

    fields = [field(name, known.is_count) for name, known in HYPERPARAMETERS.items()]
    return dataclasses.make_dataclass("Hyperparameters", fields, frozen=True)


Hyperparameters, SeveralHyperparameters = _hyperparameters(False), _hyperparameters(True)


@dataclasses.dataclass(frozen=True)
class Task:
    """The data, the network, and the steps of training."""

    dataset: str = "digits"
    """digits; mnist1d; a data set of TFDS that has images or texts and one label, such as cifar10
    or ag_news_subset; or the path of a folder, prepared by TFDS or with a subfolder of images per
    class."""
    data_dir: OrDefault[Path] = None
    """The folder that TFDS prepared the data set in (default: TFDS's own)."""
    train_examples: OrDefault[int] = None
    """Number of training examples (default: all but the validation part)."""
    image_size: OrDefault[int] = None
    """Height and width of streamed images (default: 224 if sizes vary)."""
    max_length: OrDefault[int] = None
    """Number of tokens that are kept of a text (default: 128)."""
    tokenizer: OrDefault[str] = None
    """How texts become tokens: subword, fitted on the training texts; bytes; or the path of an
    earlier run's tokenizer.json (default: subword)."""
    vocabulary_size: OrDefault[int] = None
    """Largest number of subwords (default: 8192)."""
    model: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"The network: {', '.join(ARCHITECTURES)}; or MODULE:FACTORY for a model of your "
            "own (default: mlp for digits, cnn1d for mnist1d, text-transformer for known data "
            "sets of texts, else resnet20).",
            help_behavior_hint=preset_value,
        ),
    ] = None
    from_checkpoint: str = ""
    """Folder of an earlier run. Start from the parameters of its best epoch, except the last
    layer, and with its tokenizer (default: random parameters)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model's arithmetic. Parameters and statistics are always float32."""
    weights: str = ""
    """A file model.safetensors of pretrained weights for bert-* or vit_*, in Hugging Face's layout.
    Start from these, except the last layer (default: random parameters)."""
    freeze: str = ""
    """Parameters that stay what they are, and are not perturbed: patterns of names, separated by
    commas, such as "embedding,blocks.0" (default: none)."""
    lora: int = 0
    """Rank of LoRA: train low-rank updates of the linear layers' kernels, and the last layer
    (default: 0, no LoRA)."""
    base: OrDefault[Literal["sgd", "adamw", "lion", "muon"]] = None
    """The base optimizer, with a cosine schedule to zero (default: adamw for transformers and
    text-bag, else sgd). All but sgd decay only matrices that are no embeddings."""
    label_smoothing: float = 0.1
    """Share of each label that the training loss spreads over the other classes."""

    crop_padding: OrDefault[int] = None
    """Largest random shift in pixels (default: CIFAR and SVHN 4, (Fashion-)MNIST 2, else 0).
    Not for streamed images."""
    flip: OrDefault[bool] = None
    """Mirror half of the images (default: yes, unless they show digits or are no images)."""
    cutout: OrDefault[float] = None
    """Share of the images that lose a square of 16x16 pixels (default: 0)."""

    epochs: OrDefault[int] = None
    """Passes over the training examples (default: 200; digits 50, texts 20)."""
    batch_size: OrDefault[int] = None
    """Examples per step (default: 128; digits and texts 32). An epoch drops its incomplete
    last batch."""
    microbatch_size: OrDefault[int] = None
    """Number of examples computed at a time, to save memory (default: the batch)."""
    label_noise: float = 0.0
    """Share of the training and validation labels replaced by another class."""
    workers: OrDefault[int] = None
    """Number of processes that decode streamed images (default: one per CPU, at most 16)."""

    def source(self, seed: int) -> Source:
        """Returns the request for the data set, with the seed of the label noise."""
        name = named_absolutely(self.dataset)
        which = (name, self.train_examples, self.label_noise, seed, self.image_size)
        tokenizer = self.tokenizer
        if tokenizer is None and self.from_checkpoint and dataset_spec(name).kind == "texts":
            tokenizer = str(Path(absolute(self.from_checkpoint)) / TOKENIZER)
        texts = (self.max_length, tokenizer, self.vocabulary_size)
        return Source(*which, self.data_dir, self.workers, *texts)


@dataclasses.dataclass(frozen=True)
class Perturbing:
    """Which steps are perturbed, and together with which examples: part of the method."""

    group_size: OrDefault[int] = None
    """m-sharpness: number of examples that share a perturbation (default: the batch)."""
    start_step: int = 0
    """Perturb from this step on. Earlier steps are plain and cost one gradient."""
    every: int = 1
    """From then on, perturb every N-th step. The other steps are plain."""
    perturb: Literal["all", "matrices", "norms"] = "all"
    """Which trained parameters are perturbed: all; matrices, which are kernels; or norms, which are
    scales and biases of normalization layers (SAM-ON). All are trained."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is computed. It changes only the rounding of the numbers.

    The exception is batch normalization with statistics per device.
    """

    devices: OrDefault[int] = None
    """Number of devices per process that share a batch (default: all)."""
    parallelism: Literal["jit", "shard_map", "pmap"] = "jit"
    """How they share it: one program for all devices (jit), or one for each."""
    fsdp: int = 1
    """Number of devices over which parameters and optimizer state are split."""


@dataclasses.dataclass(frozen=True)
class Config(Place, Perturbing, Hyperparameters, Task):
    """The options of one run. None stands for the default of the method, optimizer or data set."""

    method: MethodName = "bisam-log"
    """The sharpness-aware method; sgd is plain training, with any base optimizer."""
    perturbation: OrDefault[Literal["ce", "log", "tanh"]] = None
    """The ascended loss: cross-entropy, or BiSAM's (default: ce; bisam-*: as the name says)."""
    seed: int = 0
    """Random seed. The data split does not depend on it."""
    batch_statistics: Literal["synchronised", "per-device"] = "synchronised"
    """Batch normalization over the whole batch, or over each device's part (not with jit)."""
    checkpoint_every: OrDefault[int] = None
    """Steps between checkpoints (default: 1 epoch; digits, mnist1d: 10). The best one is kept."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep."""
    output: OrDefault[Path] = None
    """The run folder (default: a new one in runs/)."""

    def __post_init__(self) -> None:
        """Refuses values out of range. Messages name the options."""
        ranges = {name: known.range for name, known in HYPERPARAMETERS.items()}
        check_ranges(self, _RANGES | ranges)
        if self.model is not None:
            _check_model(self.model)
        spec = METHODS[self.method]
        if spec.ascends is not None and self.perturbation not in (None, spec.ascends):
            raise ArgumentError(
                f"--perturbation {self.perturbation} contradicts --method {self.method}: use "
                f"--method {spec.is_case_of} with it"
            )


_RANGES = {
    **dict.fromkeys(("epochs", "train_examples", "image_size", "every", "group_size"), Range(1)),
    **dict.fromkeys(("microbatch_size", "batch_size", "max_length"), Range(2)),
    "vocabulary_size": Range(258, 2**31 - 1),
    **dict.fromkeys(("checkpoint_every", "keep_checkpoints", "devices", "fsdp"), Range(1)),
    **dict.fromkeys(("crop_padding", "workers", "start_step", "lora"), Range(0)),
    **dict.fromkeys(("label_noise", "label_smoothing", "cutout"), Range(0, 1)),
    "seed": Range(0, 2**32 - 1),
}


def option_of(name: str) -> str:
    """Returns a field's name as it is typed on the command line."""
    return f"--{name.replace('_', '-')}"


def _check_model(name: str) -> None:
    """Raises ArgumentError if there is no such model."""
    try:
        architecture(name)
    except ValueError as error:
        raise ArgumentError(f"--model: {error}") from error


def absolute(path: str) -> str:
    """Returns the same path from every working directory; "" if there is none."""
    return str(Path(path).expanduser().resolve()) if path else ""


def named_absolutely(dataset: str) -> str:
    """Returns the name of a data set, or the absolute path of its folder."""
    return absolute(dataset) if is_path(dataset) else dataset


def check_ranges(options: Any, ranges: Mapping[str, Range]) -> None:
    """Raises ArgumentError if a field that is set, or one of its values, is out of range."""
    for name, allowed in ranges.items():
        value = getattr(options, name)
        if isinstance(value, tuple):
            if not value or not all(one in allowed for one in value):
                given = " ".join(f"{one:g}" for one in value) or "none"
                raise ArgumentError(f"{option_of(name)} must be numbers {allowed}, got {given}")
        elif value is not None and value not in allowed:
            raise ArgumentError(f"{option_of(name)} must be finite, {allowed}, got {value}")
