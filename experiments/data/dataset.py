"""What a data set is to the rest of the experiments."""

import hashlib
from typing import NamedTuple

import numpy as np

from experiments.data.splits import Split
from experiments.data.stream import Stream


class Dataset(NamedTuple):
    """Three disjoint parts: arrays if they fit in memory, else streams of image files.

    Label noise is in train and validation alone.

    Attributes:
        train: to learn from.
        validation: to choose the checkpoint.
        test: to report.
        classes: labels are 0 to `classes - 1`.
        image_shape: height, width, channels, as they reach the model.
        mean: float32[channels], in the units of the images.
        std: float32[channels], in the units of the images.
        name: as it was asked for.
    """

    train: Split | Stream
    validation: Split | Stream
    test: Split | Stream
    classes: int
    image_shape: tuple[int, int, int]
    mean: np.ndarray
    std: np.ndarray
    name: str


def fingerprint(dataset: Dataset) -> str:
    """Tells data sets apart: by all bytes in memory, by which records are streamed."""
    digest = hashlib.blake2b(repr((dataset.name, dataset.classes, dataset.image_shape)).encode())
    for split in (dataset.train, dataset.validation, dataset.test):
        if isinstance(split, Stream):
            arrays = (split.records.indices, split.records.offsets)
        else:
            arrays = (split.images, split.labels)
        for array in arrays:
            digest.update(array.tobytes())
    return digest.hexdigest()
