"""What a data set is to the other rooms: what is requested, and what comes back."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Source:
    """A request for a data set.

    Attributes:
        name: "digits", or as TFDS writes it: `name`, `name/config`, `name:1.0.0`.
        train_examples: number of training examples; None for all but the validation part.
        label_noise: share of the training and validation labels that another class replaces.
        seed: seed of the label noise.
        image_size: height and width in pixels; None for the stored size, or 224 if sizes vary.
        data_dir: where TFDS prepared the data set; None for TFDS's own folder.
        workers: processes that decode streamed images; None for one per CPU, at most 16.
    """

    name: str
    train_examples: int | None = None
    label_noise: float = 0.0
    seed: int = 0
    image_size: int | None = None
    data_dir: Path | None = None
    workers: int | None = None


class Part(Protocol):
    """Part of a data set: :class:`Split` in memory, or :class:`Stream` from disk."""

    @property
    def streamed(self) -> bool:
        """Whether batches are read from disk. Streamed training images come randomly cropped."""
        ...

    @property
    def examples(self) -> int:
        """The number of examples."""
        ...

    @property
    def identity(self) -> tuple[Any, ...]:
        """Arrays that differ if the examples differ."""
        ...

    def sample(self) -> Iterator[np.ndarray]:
        """Yields images, or blocks of images, to take the mean and standard deviation of."""
        ...


class Dataset(NamedTuple):
    """Three disjoint parts. Label noise affects only train and validation.

    Attributes:
        train: to train on.
        validation: to choose the checkpoint.
        test: to report.
        classes: number of classes; labels are 0 to `classes - 1`.
        image_shape: height, width and channels of the images that reach the model.
        mean: float32[channels], in the units of the images.
        std: float32[channels], in the units of the images.
        name: the requested name.
    """

    train: Part
    validation: Part
    test: Part
    classes: int
    image_shape: tuple[int, int, int]
    mean: np.ndarray
    std: np.ndarray
    name: str

    @property
    def fingerprint(self) -> str:
        """A hash of all bytes in memory, or of which records are streamed."""
        known = repr((self.name, self.classes, self.image_shape))
        digest = hashlib.blake2b(known.encode())
        for part in (self.train, self.validation, self.test):
            for array in part.identity:
                digest.update(array.tobytes())
        return digest.hexdigest()
