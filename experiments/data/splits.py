"""A part of a data set in memory, and label noise."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

SPLIT_SEED = 0
BLOCK = 1000


class DatasetError(ValueError):
    """A data set that is missing or cannot be used as requested. The message says what to do."""


@contextlib.contextmanager
def damaged_files(name: str) -> Iterator[None]:
    """Makes every error of reading files a DatasetError: damaged ones can make readers raise any.

    Args:
        name: what is read.
    """
    try:
        yield
    except (DatasetError, ModuleNotFoundError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DatasetError(
            f"{name} cannot be read, perhaps because a file of it is damaged: {lines[0][:200]}"
        ) from error


class Split(NamedTuple):
    """Images and labels in memory: NumPy arrays, or JAX arrays once they are on devices.

    Attributes:
        images: uint8[examples, height, width, channels]; float32 for signals; tokens of texts:
            uint16 or int32[examples, length].
        labels: int32[examples].
    """

    images: Any
    labels: Any

    @property
    def streamed(self) -> bool:
        """False: it is in memory."""
        return False

    @property
    def examples(self) -> int:
        """The number of examples."""
        return len(self.labels)

    @property
    def identity(self) -> tuple[Any, ...]:
        """All images and labels."""
        return (self.images, self.labels)

    def sample(self) -> Iterator[np.ndarray]:
        """Yields all images in blocks."""
        return (self.images[block] for block in blocks(self.examples))


def blocks(count: int) -> Iterator[slice]:
    """Yields slices of at most `BLOCK` that cover `count` examples."""
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def label_offsets(count: int, share: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Returns what label noise adds to each of `count` labels, modulo `classes`: int32[count].

    `round(share * count)` of them are not 0, and make every other class equally likely.
    """
    wrong = rng.permutation(count)[: round(share * count)]
    offsets = np.zeros(count, np.int32)
    offsets[wrong] = rng.integers(1, classes, len(wrong))
    return offsets


def first_examples(indices: np.ndarray, count: int | None) -> np.ndarray:
    """Returns the first `count` training examples, or all. Smaller subsets lie in larger ones."""
    if count is None:
        return indices
    if not 1 <= count <= len(indices):
        raise DatasetError(
            f"train_examples must be at least 1 and at most {len(indices)}, got {count}"
        )
    return indices[:count]
