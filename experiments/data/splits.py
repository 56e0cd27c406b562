"""A part of a data set in memory, and noise in its labels."""

from typing import Any, NamedTuple

import numpy as np

SPLIT_SEED = 0


class DatasetError(ValueError):
    """There is no such data set, or it cannot be used as asked; the message says what to do."""


class Split(NamedTuple):
    """Images, uint8[examples, height, width, channels], and labels, int32[examples].

    NumPy arrays until they are laid over devices.
    """

    images: Any
    labels: Any


def label_offsets(count: int, share: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    """What label noise adds to each of `count` labels, modulo `classes`: int32[count].

    Not 0 for `round(share * count)` of them, and for those any other class alike.
    """
    wrong = rng.permutation(count)[: round(share * count)]
    offsets = np.zeros(count, np.int32)
    offsets[wrong] = rng.integers(1, classes, len(wrong))
    return offsets


def with_label_noise(
    labels: np.ndarray, share: float, classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Replaces `round(share * len(labels))` labels, each by any other class alike."""
    return (labels + label_offsets(len(labels), share, classes, rng)) % classes


def first_examples(indices: np.ndarray, count: int | None) -> np.ndarray:
    """The first `count` training examples, or all: a smaller subset is part of a larger one."""
    if count is None:
        return indices
    if not 1 <= count <= len(indices):
        raise DatasetError(
            f"train_examples must be at least 1 and at most {len(indices)}, got {count}"
        )
    return indices[:count]
