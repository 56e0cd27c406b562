"""Any image classification data set of TFDS: in memory if it fits, else as streams."""

from typing import Any

import numpy as np

from experiments.data import image_files
from experiments.data.dataset import Dataset, Source
from experiments.data.encoded import MEMORY_LIMIT, Encoded, dataset_from_records
from experiments.data.prepared import open_builder
from experiments.data.splits import DatasetError

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
    missing or has no labels.

    Args:
        source: the request.
        memory_limit: see :func:`dataset_from_records`.

    Raises:
        DatasetError: if the data set is not on disk, not in array_record format, not an image
            classification data set, or has fewer training examples than requested.

    References:
        `tensorflow.org/datasets <https://www.tensorflow.org/datasets>`_. The mean and standard
        deviation of ImageNet are torchvision's. Imagenette is a part of ImageNet and uses them.
    """
    builder = open_builder(source.name, source.data_dir)
    image_key, label_key = _keys(builder.info)
    height, width, channels = builder.info.features[image_key].shape
    classes = builder.info.features[label_key].num_classes
    parts = _sources(builder, label_key)
    encoded = Encoded(*parts, image_key, label_key, (height, width), channels, classes)
    statistics = STATISTICS.get(builder.info.name)
    return dataset_from_records(source, encoded, statistics, memory_limit=memory_limit)


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
