"""Data sets, split and either held in memory or streamed."""

import os

from experiments.data.dataset import Dataset as Dataset
from experiments.data.dataset import fingerprint as fingerprint
from experiments.data.digits import digits as digits
from experiments.data.splits import DatasetError as DatasetError
from experiments.data.splits import Split as Split
from experiments.data.splits import with_label_noise as with_label_noise
from experiments.data.stream import Stream as Stream
from experiments.data.tfds_images import MEMORY_LIMIT as MEMORY_LIMIT
from experiments.data.tfds_images import tfds_images as tfds_images


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    train_examples: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
    image_size: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    workers: int | None = None,
) -> Dataset:
    """A data set by its name: "digits", which is always there, or one that TFDS prepared.

    See :func:`tfds_images` for the arguments and for what it raises.
    """
    if name != "digits":
        return tfds_images(
            name, data_dir, train_examples, label_noise, seed, image_size, memory_limit, workers
        )
    if image_size not in (None, 8):
        raise DatasetError(f"the digits have 8x8 pixels: image_size must be 8, got {image_size}")
    return digits(label_noise, seed, train_examples)
