"""Any image classification data set of TFDS: in memory if it fits, else as streams."""

from typing import Any

import numpy as np

from experiments.data import image_files
from experiments.data.dataset import Dataset, Source
from experiments.data.encoded import MEMORY_LIMIT, Encoded, dataset_from_records
from experiments.data.prepared import key_of, train_and_test
from experiments.data.splits import DatasetError

# Mean and standard deviation per channel of the training images scaled to [0, 1].
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "imagenette": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def tfds_images(source: Source, builder: Any, *, memory_limit: int = MEMORY_LIMIT) -> Dataset:
    """Returns a data set of images that TFDS has prepared on disk.

    90 % of TFDS's training split are the training part, and 10 % are the validation part, which
    does not depend on the seed.

    Args:
        source: the request.
        builder: TFDS's, of the data set.
        memory_limit: see :func:`dataset_from_records`.

    Raises:
        DatasetError: if the data set is not an image classification data set, or has fewer
            training examples than requested.

    References:
        `tensorflow.org/datasets <https://www.tensorflow.org/datasets>`_. The mean and standard
        deviation of ImageNet are torchvision's. Imagenette is a part of ImageNet and uses them.
    """
    image_key, label_key = _keys(builder.info)
    height, width, channels = builder.info.features[image_key].shape
    classes = builder.info.features[label_key].num_classes
    parts = train_and_test(builder, label_key)
    encoded = Encoded(*parts, image_key, label_key, (height, width), channels, classes)
    statistics = STATISTICS.get(builder.info.name)
    return dataset_from_records(source, encoded, statistics, memory_limit=memory_limit)


def _keys(info: Any) -> tuple[str, str]:
    """Returns the keys of the image and of the label among the features."""
    import tensorflow_datasets as tfds

    supervised = info.supervised_keys or (None, None)
    image = key_of(info, tfds.features.Image, supervised[0], "image")
    label = key_of(info, tfds.features.ClassLabel, supervised[1], "label")
    shape, dtype = info.features[image].shape, info.features[image].np_dtype
    if len(shape) != 3 or shape[-1] not in image_files.MODES or dtype != np.uint8:
        raise DatasetError(
            f"the images of {info.full_name} should be uint8 with "
            f"{', '.join(map(str, image_files.MODES))} channels, but are {dtype} of shape {shape}"
        )
    return image, label
