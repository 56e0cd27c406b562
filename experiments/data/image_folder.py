"""A folder of image files, with a subfolder for each class."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.data.dataset import Dataset, Source
from experiments.data.encoded import Encoded, dataset_from_records
from experiments.data.splits import SPLIT_SEED, DatasetError

SUFFIXES = tuple(sorted(Image.registered_extensions()))
TEST_SHARE = 0.2
_TRAIN, _TEST = ("train", "training"), ("test", "val", "valid", "validation")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files and their labels, read when they are asked for, as TFDS's data sources are.

    Attributes:
        paths: one per example.
        labels: int[examples].
    """

    paths: Sequence[Path]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the encoded images and labels of the examples at `indices`."""
        return [
            {"image": self.paths[index].read_bytes(), "label": self.labels[index]}
            for index in indices
        ]


def image_folder(source: Source) -> Dataset:
    """Returns a data set of image files.

    The folder has a subfolder per class, or `train` and `test` (or `val`), each with a subfolder
    per class. Without `test`, 20 % of the images are the test part. 10 % of the others are the
    validation part. The parts do not depend on the seed. Classes are numbered in the order of
    their names.

    Images of one size that fit in memory are kept there; others are streamed.

    Args:
        source: the request; its name is the path of the folder.

    Raises:
        DatasetError: if the folder is not as described, or has fewer training examples than
            requested.
    """
    root = Path(source.name).expanduser()
    if not root.is_dir():
        raise DatasetError(f"there is no folder {root}")
    train_root, test_root = (_subfolder(root, names) for names in (_TRAIN, _TEST))
    classes = _classes(train_root or root)
    train = _files(train_root or root, classes)
    if train_root is None:
        train, test = _divided(train)
    elif test_root is None:
        raise DatasetError(f"{root} has {train_root.name}, but no test: add {root / 'test'}")
    elif unknown := sorted(set(_classes(test_root)) - set(classes)):
        raise DatasetError(f"{test_root} has classes without training images: {unknown}")
    else:
        test = _files(test_root, classes)
    size, channels = _form([*train.paths, *test.paths])
    encoded = Encoded(train, test, "image", "label", size, channels, len(classes))
    return dataset_from_records(source, encoded)


def _subfolder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _classes(root: Path) -> list[str]:
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise DatasetError(
            f"{root} has {len(classes)} subfolders with images: there must be one per class, and "
            "two classes at least. For a data set of TFDS, name the folder with its "
            "dataset_info.json"
        )
    return classes


def _files(root: Path, classes: Sequence[str]) -> ImageFiles:
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        paths += found
        labels += [label] * len(found)
    if len(paths) < 2:
        raise DatasetError(f"{root} has {len(paths)} image files ({', '.join(SUFFIXES[:4])}, ...)")
    return ImageFiles(paths, np.asarray(labels))


def _divided(files: ImageFiles) -> tuple[ImageFiles, ImageFiles]:
    """Returns a training and a test part, in a random order that is always the same."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(files))
    held_out = max(1, round(TEST_SHARE * len(files)))
    parts = (np.sort(order[held_out:]), np.sort(order[:held_out]))
    train, test = (ImageFiles([files.paths[i] for i in p], files.labels[p]) for p in parts)
    return train, test


def _form(paths: Sequence[Path]) -> tuple[tuple[int | None, int | None], int]:
    """Returns the common size of the images, None if they differ, and the number of channels."""
    sizes, modes = set(), set()
    for path in paths:
        try:
            with Image.open(path) as image:  # reads the header only
                sizes.add((image.height, image.width))
                modes.add(image.mode)
        except (OSError, UnidentifiedImageError) as error:
            raise DatasetError(f"{path} is no image: {error}") from error
        if len(sizes) > 1 and not modes <= {"1", "L"}:
            break  # nothing more can change
    height, width = sizes.pop() if len(sizes) == 1 else (None, None)
    return (height, width), 1 if modes <= {"1", "L"} else 3
