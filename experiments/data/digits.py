"""The digits that come with scikit-learn, so that nothing is downloaded."""

import numpy as np

from experiments.data.arrays import dataset_from_arrays
from experiments.data.dataset import Dataset, Source
from experiments.data.splits import DatasetError


def digits(source: Source) -> Dataset:
    """Returns scikit-learn's 1,797 digits: 8x8 pixels with values from 0 to 16.

    1,257 examples are for training, 180 choose the checkpoint, and 360 are for the test.

    Raises:
        DatasetError: if more training examples, or images of another size, are requested.

    References:
        Alpaydin and Kaynak, `Optical Recognition of Handwritten Digits
        <https://doi.org/10.24432/C50P49>`_, UCI Machine Learning Repository, 1998
    """
    if source.name != "digits":
        raise DatasetError(
            f"the digits have no configurations or versions: use 'digits', got {source.name!r}"
        )
    # Imported here because it takes 1 s, also in each worker of a stream.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return dataset_from_arrays(
        source,
        pixels.reshape(-1, 8, 8, 1).astype(np.uint8),
        labels,
        classes=10,
        validation=180,
        test=360,
        mean=np.zeros(1, np.float32),
        std=np.full(1, 16, np.float32),
    )
