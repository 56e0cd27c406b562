"""A data set from encoded images on disk: in memory if it fits, else as streams."""

import os
from typing import Any, NamedTuple

import numpy as np

from experiments.data import image_files
from experiments.data.dataset import Dataset, Part, Source
from experiments.data.records import Records
from experiments.data.splits import SPLIT_SEED, Split, blocks, first_examples, label_offsets
from experiments.data.stream import Stream

MEMORY_LIMIT = 4 * 2**30
IMAGE_SIZE = 224
VALIDATION_SHARE = 0.1

# Means and standard deviations per channel of images scaled to [0, 1].
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class Encoded(NamedTuple):
    """Where the encoded images of a data set are, and what they are.

    Attributes:
        train: records for training and validation; `__getitems__` reads them.
        test: records of the test part.
        image_key: key of the image in a record.
        label_key: key of the label in a record.
        size: height and width of the images; None where they differ.
        channels: number of channels of the decoded images.
        classes: number of classes; labels are 0 to `classes - 1`.
    """

    train: Any
    test: Any
    image_key: str
    label_key: str
    size: tuple[int | None, int | None]
    channels: int
    classes: int


def dataset_from_records(
    source: Source,
    encoded: Encoded,
    statistics: Statistics | None = None,
    *,
    memory_limit: int = MEMORY_LIMIT,
) -> Dataset:
    """Returns a data set of encoded images.

    10 % of the records for training are the validation part, which does not depend on the seed.
    Images are streamed if they differ in size, if another `image_size` is requested, or if they
    need more memory than the limit.

    Args:
        source: the request.
        encoded: the images.
        statistics: known statistics of the training images; None to compute them.
        memory_limit: largest size in memory, in bytes. A larger data set is streamed.

    Raises:
        DatasetError: if there are fewer training examples than requested.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(encoded.train))
    held_out = max(1, round(VALIDATION_SHARE * len(order)))
    train_rng, validation_rng = np.random.default_rng(source.seed).spawn(2)
    what = (encoded.image_key, encoded.label_key, encoded.channels, encoded.classes)

    def noisy(indices: np.ndarray, count: int | None, rng: np.random.Generator) -> Records:
        # Drawn for all examples, so that a smaller subset has the labels of a larger one.
        offsets = label_offsets(len(indices), source.label_noise, encoded.classes, rng)
        first = first_examples(np.arange(len(indices)), count)
        return Records(encoded.train, *what, indices[first], offsets[first])

    test = np.arange(len(encoded.test))
    parts = [
        noisy(order[held_out:], source.train_examples, train_rng),
        noisy(order[:held_out], None, validation_rng),
        Records(encoded.test, *what, test, np.zeros_like(test)),
    ]
    height, width = encoded.size
    as_stored = source.image_size in (None, height) and source.image_size in (None, width)
    if height is None or width is None or not as_stored:
        height = width = source.image_size or IMAGE_SIZE
        in_memory = False
    else:
        pixels = sum(map(len, parts)) * height * width
        in_memory = pixels * encoded.channels <= memory_limit
    shape = (height, width, encoded.channels)
    if in_memory:
        train, validation, test = (_in_memory(part, shape) for part in parts)
    else:
        processes = min(16, os.cpu_count() or 1) if source.workers is None else source.workers
        train, validation, test = (Stream(part, (height, width), processes) for part in parts)
    mean, std = _statistics(train) if statistics is None else 255 * np.asarray(statistics)
    mean, std = mean.astype(np.float32), std.astype(np.float32)
    return Dataset(train, validation, test, encoded.classes, shape, mean, std, source.name)


def _in_memory(records: Records, shape: tuple[int, int, int]) -> Split:
    images = np.empty((len(records), *shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for block in blocks(len(records)):
        files, labels[block] = zip(*records.read(block), strict=True)
        for image, file in zip(images[block], files, strict=True):
            image[:] = image_files.decode(file, records.channels)
    return Split(images, labels)


def _statistics(train: Part) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation: float64[channels] in the units of the images."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for images in train.sample():
        pixels = images.reshape(-1, images.shape[-1]).astype(np.float64)
        count, total = count + len(pixels), total + pixels.sum(0)
        squares = squares + np.square(pixels).sum(0)
    mean = total / count
    variance = squares / count - mean**2
    return mean, np.sqrt(np.where(variance > 0, variance, 1))
