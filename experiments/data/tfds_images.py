"""Any image classification data set of TFDS: in memory if it fits, else as streams."""

import os
from typing import Any

import numpy as np

from experiments.data import image_files
from experiments.data.dataset import Dataset, Part, Source
from experiments.data.prepared import open_builder
from experiments.data.records import Records
from experiments.data.splits import (
    SPLIT_SEED,
    DatasetError,
    Split,
    blocks,
    first_examples,
    label_offsets,
)
from experiments.data.stream import Stream

MEMORY_LIMIT = 4 * 2**30
IMAGE_SIZE = 224
VALIDATION_SHARE = 0.1

# Mean and standard deviation per channel of the training images scaled to [0, 1].
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "imagenette": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def tfds_images(source: Source, *, memory_limit: int = MEMORY_LIMIT) -> Dataset:
    """Returns a data set that TFDS has prepared on disk.

    90 % of TFDS's training split are the training part, and 10 % are the validation part, which
    does not depend on the seed. The test part is TFDS's `test`, or `validation` if `test` is
    missing or has no labels. Images are streamed if they differ in size, if another `image_size`
    is requested, or if they need more memory than the limit.

    Args:
        source: the request.
        memory_limit: largest size in memory, in bytes. A larger data set is streamed.

    Raises:
        DatasetError: if the data set is not on disk, not in array_record format, not an image
            classification data set, or has fewer training examples than requested.

    References:
        `tensorflow.org/datasets <https://www.tensorflow.org/datasets>`_. The mean and standard
        deviation of ImageNet are torchvision's. Imagenette is a part of ImageNet and uses them.
    """
    builder = open_builder(source.name, source.data_dir)
    image_key, label_key = _keys(builder.info)
    *size, channels = builder.info.features[image_key].shape
    classes = builder.info.features[label_key].num_classes
    train_records, test_records = _sources(builder, label_key)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train_records))
    held_out = max(1, round(VALIDATION_SHARE * len(order)))
    train_rng, validation_rng = np.random.default_rng(source.seed).spawn(2)

    def records(known: Any, indices: np.ndarray, offsets: np.ndarray) -> Records:
        return Records(known, image_key, label_key, channels, classes, indices, offsets)

    def noisy(indices: np.ndarray, count: int | None, rng: np.random.Generator) -> Records:
        # Drawn for all examples, so that a smaller subset has the labels of a larger one.
        offsets = label_offsets(len(indices), source.label_noise, classes, rng)
        first = first_examples(np.arange(len(indices)), count)
        return records(train_records, indices[first], offsets[first])

    test = np.arange(len(test_records))
    parts = [
        noisy(order[held_out:], source.train_examples, train_rng),
        noisy(order[:held_out], None, validation_rng),
        records(test_records, test, np.zeros_like(test)),
    ]
    as_stored = None not in size and size == [source.image_size or length for length in size]
    if as_stored and sum(map(len, parts)) * np.prod([*size, channels]) <= memory_limit:
        shape = (size[0], size[1], channels)
        train, validation, test = (_in_memory(part, shape) for part in parts)
    else:
        height, width = size if as_stored else 2 * [source.image_size or IMAGE_SIZE]
        shape = (height, width, channels)
        processes = min(16, os.cpu_count() or 1) if source.workers is None else source.workers
        train, validation, test = (Stream(part, (height, width), processes) for part in parts)
    mean, std = _statistics(builder.info.name, train)
    return Dataset(train, validation, test, classes, shape, mean, std, source.name)


def _keys(info: Any) -> tuple[str, str]:
    """Returns the keys of the image and of the label among the features."""
    import tensorflow_datasets as tfds

    supervised = info.supervised_keys or (None, None)

    def key_of(kind: type, *preferred: Any) -> str:
        keys = sorted(key for key, value in info.features.items() if isinstance(value, kind))
        for key in preferred:
            if key in keys:
                return key
        if len(keys) != 1:
            raise DatasetError(
                f"{info.full_name} is no image classification data set: it should have one "
                f"{kind.__name__}, but has {keys} in {info.features}"
            )
        return keys[0]

    image = key_of(tfds.features.Image, supervised[0], "image")
    label = key_of(tfds.features.ClassLabel, supervised[1], "label")
    shape, dtype = info.features[image].shape, info.features[image].np_dtype
    if len(shape) != 3 or shape[-1] not in image_files.MODES or dtype != np.uint8:
        raise DatasetError(
            f"the images of {info.full_name} should be uint8 with "
            f"{', '.join(map(str, image_files.MODES))} channels, but are {dtype} of shape {shape}"
        )
    return image, label


def _sources(builder: Any, label_key: str) -> tuple[Any, Any]:
    """Returns TFDS's data sources of the training and the test part."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [key for key in features if isinstance(features[key], tfds.features.Image)]
    skip = {key: tfds.decode.SkipDecoding() for key in images}

    def source(split: str) -> Any:
        return builder.as_data_source(split, decoders=skip, file_format="array_record")

    def first_label(split: str) -> int:
        try:
            return source(split)[0][label_key]
        except Exception as error:
            raise DatasetError(f"{builder.data_dir} cannot be read: {error}") from error

    splits = builder.info.splits
    if "train" in splits:
        for name in ("test", "validation"):
            # In ImageNet's test split the labels are -1.
            if name in splits and first_label(name) >= 0:
                return source("train"), source(name)
    raise DatasetError(
        f"{builder.info.full_name} should have the split train, and test or validation with "
        f"labels, but has {', '.join(splits)}"
    )


def _in_memory(records: Records, shape: tuple[int, int, int]) -> Split:
    images = np.empty((len(records), *shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for block in blocks(len(records)):
        files, labels[block] = zip(*records.read(block), strict=True)
        for image, file in zip(images[block], files, strict=True):
            image[:] = image_files.decode(file, records.channels)
    return Split(images, labels)


def _statistics(name: str, train: Part) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation: float32[channels] in the units of the images."""
    if name in STATISTICS:
        mean, std = (255 * np.asarray(values) for values in STATISTICS[name])
    else:
        count, total, squares = 0, np.zeros(1), np.zeros(1)
        for images in train.sample():
            pixels = images.reshape(-1, images.shape[-1]).astype(np.float64)
            count, total = count + len(pixels), total + pixels.sum(0)
            squares = squares + np.square(pixels).sum(0)
        mean = total / count
        variance = squares / count - mean**2
        std = np.sqrt(np.where(variance > 0, variance, 1))
    return mean.astype(np.float32), std.astype(np.float32)
