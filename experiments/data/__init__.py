"""Data sets: three parts of images, signals or texts, and labels, in memory or streamed.

Nothing here knows models, methods or devices. `DATASETS` is the only list of data sets. The name of
a data set from elsewhere is the path of its folder.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.data.dataset import Dataset as Dataset
from experiments.data.dataset import Part as Part
from experiments.data.dataset import Source as Source
from experiments.data.digits import digits
from experiments.data.image_folder import image_folder
from experiments.data.mnist1d import mnist1d
from experiments.data.prepared import VERSION, is_prepared
from experiments.data.prepared import is_path as is_path
from experiments.data.splits import DatasetError as DatasetError
from experiments.data.splits import Split as Split
from experiments.data.splits import damaged_files
from experiments.data.stream import Stream as Stream
from experiments.data.tfds_prepared import tfds_prepared


class DatasetSpec(NamedTuple):
    """How a data set is loaded, and the defaults of a run on it.

    Attributes:
        load: returns the data set of a request.
        model: name of the network.
        epochs: passes over the training part.
        batch_size: examples per step.
        crop_padding: largest random shift of an image, in pixels.
        flip: whether half of the images are mirrored. Digits are not: a mirrored digit is wrong.
        cutout: share of the images that lose a square.
        checkpoint_epochs: epochs between checkpoints.
        white: largest value of a pixel.
        kind: what an example is, in the plural: "images", "signals" or "texts".
    """

    load: Callable[[Source], Dataset] = tfds_prepared
    model: str = "resnet20"
    epochs: int = 200
    batch_size: int = 128
    crop_padding: int = 0
    flip: bool = True
    cutout: float = 0.0
    checkpoint_epochs: int = 1
    white: int = 255
    kind: str = "images"


_TEXTS = DatasetSpec(model="text-transformer", epochs=20, batch_size=32, flip=False, kind="texts")
DATASETS = {
    "digits": DatasetSpec(
        digits, model="mlp", epochs=50, batch_size=32, flip=False, checkpoint_epochs=10, white=16
    ),
    "mnist1d": DatasetSpec(
        mnist1d, model="cnn1d", flip=False, checkpoint_epochs=10, kind="signals"
    ),
    "mnist": DatasetSpec(crop_padding=2, flip=False),
    "svhn_cropped": DatasetSpec(crop_padding=4, flip=False),
    "fashion_mnist": DatasetSpec(crop_padding=2),
    "cifar10": DatasetSpec(crop_padding=4),
    "cifar100": DatasetSpec(crop_padding=4),
    "ag_news_subset": _TEXTS,
    "glue": _TEXTS,
    "imdb_reviews": _TEXTS,
    "newsgroups_20": _TEXTS,
    "reuters_r8": _TEXTS,
}


def dataset_spec(name: str) -> DatasetSpec:
    """Returns the spec of a data set.

    Args:
        name: a key of `DATASETS`; another name that TFDS prepared; or the path of a folder, which
            TFDS prepared or which has images by class. A folder with the name of a known data set
            has its defaults.
    """
    spec = DATASETS.get(base_name(name), DatasetSpec())
    if not is_path(name):
        return spec
    return spec._replace(load=tfds_prepared if is_prepared(Path(name)) else image_folder)


def white_of(name: str) -> int:
    """Returns the largest value of a pixel.

    Raises:
        DatasetError: if the examples are not images.
    """
    spec = dataset_spec(name)
    if spec.kind != "images":
        raise DatasetError(f"{name} has {spec.kind}, not images: there are no pixels to attack")
    return spec.white


def base_name(name: str) -> str:
    """Returns the name without configuration and version, or the name of a folder."""
    if is_path(name):
        path = Path(name).expanduser().resolve()
        return path.parent.name if VERSION.fullmatch(path.name) else path.name
    return re.split("[/:]", name)[0]


def load(source: Source) -> Dataset:
    """Loads a data set.

    Raises:
        DatasetError: if it is not there, or cannot be used as requested.
    """
    with damaged_files(source.name):
        loaded = dataset_spec(source.name).load(source)
    for name in ("max_length", "tokenizer", "vocabulary_size"):
        if not loaded.vocabulary and getattr(source, name) is not None:
            raise DatasetError(f"{name} has no meaning for {source.name}, which has no texts")
    return loaded
