"""MNIST-1D: digits drawn as signals of 40 numbers, made by its authors' generator."""

import functools
import random

import numpy as np

from experiments.data.arrays import dataset_from_arrays
from experiments.data.dataset import Dataset, Source
from experiments.data.splits import DatasetError


def mnist1d(source: Source) -> Dataset:
    """Returns the 5,000 signals of MNIST-1D: float32 "images" of 1x40 values, in ten classes.

    The 1,000 test examples are the published ones. Of the 4,000 others, 3,600 are for training and
    400 choose the checkpoint. Nothing is downloaded: the package `mnist1d` draws the signals with a
    fixed seed.

    Raises:
        DatasetError: if the package is not installed; or if more training examples, or images of
            another size, are requested.

    References:
        Greydanus and Kobak, `Scaling Down Deep Learning with MNIST-1D
        <https://arxiv.org/abs/2011.14439>`_, ICML 2024
    """
    if source.name != "mnist1d":
        raise DatasetError(
            f"MNIST-1D has no configurations or versions: use 'mnist1d', got {source.name!r}"
        )
    made = _made()
    signals = np.concatenate([made["x"], made["x_test"]]).astype(np.float32)
    labels = np.concatenate([made["y"], made["y_test"]])
    return dataset_from_arrays(
        source,
        signals[:, None, :, None],
        labels,
        classes=10,
        validation=400,
        test=np.arange(len(made["y"]), len(labels)),
        # The generator has standardized them.
        mean=np.zeros(1, np.float32),
        std=np.ones(1, np.float32),
    )


@functools.cache
def _made() -> dict[str, np.ndarray]:
    """Returns the published data set, bit for bit."""
    # Imported here because it takes 1 s, and only this data set needs it.
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError as error:
        raise DatasetError(
            "the generator of MNIST-1D is not installed: pip install 'bisam_jax[mnist1d]'"
        ) from error
    # It seeds the global generators: others must not notice.
    before = random.getstate(), np.random.get_state()
    try:
        return make_dataset(get_dataset_args())
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
