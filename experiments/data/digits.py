"""The data set that comes with scikit-learn. It needs no download."""

import numpy as np

from experiments.data.dataset import Dataset, Source
from experiments.data.splits import (
    SPLIT_SEED,
    DatasetError,
    Split,
    first_examples,
    with_label_noise,
)


def digits(source: Source) -> Dataset:
    """Returns scikit-learn's 1,797 digits: 8x8 pixels from 0 to 16.

    The split is stratified and does not depend on the seed: 1,257 training, 180 validation and 360
    test examples.

    Raises:
        DatasetError: if too many training examples or another image size are requested.

    References:
        Alpaydin and Kaynak, `Optical Recognition of Handwritten Digits
        <https://doi.org/10.24432/C50P49>`_, UCI Machine Learning Repository, 1998
    """
    if source.name != "digits":
        raise DatasetError(
            f"the digits have no configurations or versions: use 'digits', got {source.name!r}"
        )
    if source.image_size not in (None, 8):
        raise DatasetError(
            f"the digits have 8x8 pixels: image_size must be 8, got {source.image_size}"
        )
    # Imported here because it takes 1 s, also in each worker of a stream.
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = targets.astype(np.int32)
    rest, test = _stratified(np.arange(len(labels)), labels, 360)
    train, validation = _stratified(rest, labels, 180)
    train_rng, validation_rng = np.random.default_rng(source.seed).spawn(2)
    # Drawn for all examples, so that a smaller subset has the labels of a larger one.
    train_labels = with_label_noise(labels[train], source.label_noise, 10, train_rng)
    first = first_examples(np.arange(len(train)), source.train_examples)
    validation_labels = with_label_noise(labels[validation], source.label_noise, 10, validation_rng)
    return Dataset(
        train=Split(images[train[first]], train_labels[first]),
        validation=Split(images[validation], validation_labels),
        test=Split(images[test], labels[test]),
        classes=10,
        image_shape=(8, 8, 1),
        mean=np.zeros(1, np.float32),
        std=np.full(1, 16, np.float32),
        name="digits",
    )


def _stratified(
    indices: np.ndarray, labels: np.ndarray, held_out: int
) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    kept, out = train_test_split(
        indices, test_size=held_out, stratify=labels[indices], random_state=SPLIT_SEED
    )
    return np.asarray(kept), np.asarray(out)
