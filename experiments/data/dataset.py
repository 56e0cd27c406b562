"""The interface of a data set: the request for it, and its parts."""

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
        name: "digits", "mnist1d", or as TFDS writes it: `name`, `name/config`, `name:1.0.0`.
        train_examples: number of training examples; None for all but the validation part.
        label_noise: share of the training and validation labels that are replaced by another
            class.
        seed: seed of the label noise.
        image_size: height and width in pixels; None for the stored size, or 224 if sizes vary.
        data_dir: where TFDS prepared the data set; None for TFDS's own folder.
        workers: processes that decode streamed images; None for one per CPU, at most 16.
        max_length: number of tokens that are kept of a text, with the one before it; None for 128.
        tokenizer: "subword", "bytes" or the path of a tokenizer: see
            :func:`experiments.data.tokens.tokens_for`; None for "subword".
        vocabulary_size: largest number of subwords; None for 8,192.
    """

    name: str
    train_examples: int | None = None
    label_noise: float = 0.0
    seed: int = 0
    image_size: int | None = None
    data_dir: Path | None = None
    workers: int | None = None
    max_length: int | None = None
    tokenizer: str | None = None
    vocabulary_size: int | None = None


class Part(Protocol):
    """Part of a data set: :class:`Split` in memory, or :class:`Stream` from disk."""

    @property
    def streamed(self) -> bool:
        """Whether batches are read from disk. Streamed training images are randomly cropped."""
        ...

    @property
    def examples(self) -> int:
        """The number of examples."""
        ...

    @property
    def identity(self) -> tuple[Any, ...]:
        """The arrays that differ if the examples differ."""
        ...

    def sample(self) -> Iterator[np.ndarray]:
        """Yields images, or blocks of images, for the mean and the standard deviation."""
        ...


class Dataset(NamedTuple):
    """The three disjoint parts of a data set. Label noise affects only train and validation.

    Attributes:
        train: the part to train on.
        validation: the part that chooses the checkpoint.
        test: the part that is reported.
        classes: number of classes; labels are 0 to `classes - 1`.
        image_shape: height, width and channels of the images that reach the model; the number of
            tokens of a text.
        mean: float32[channels], mean of the pixels, in the units of the images; empty for texts.
        std: float32[channels], their standard deviation, in the same units; empty for texts.
        name: the requested name.
        vocabulary: number of different tokens; 0 if the examples are not texts.
        tokenizer: what made the tokens: see :class:`experiments.data.tokens.Tokens`.
    """

    train: Part
    validation: Part
    test: Part
    classes: int
    image_shape: tuple[int, ...]
    mean: np.ndarray
    std: np.ndarray
    name: str
    vocabulary: int = 0
    tokenizer: str = ""

    @property
    def fingerprint(self) -> str:
        """A hash of all bytes in memory, or of the list of streamed records."""
        known = repr((self.name, self.classes, self.image_shape))
        digest = hashlib.blake2b(known.encode())
        for part in (self.train, self.validation, self.test):
            for array in part.identity:
                digest.update(array.tobytes())
        return digest.hexdigest()
