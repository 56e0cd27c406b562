"""The data set that comes with scikit-learn: nothing to download."""

import numpy as np

from experiments.data.dataset import Dataset
from experiments.data.splits import (
    SPLIT_SEED,
    Split,
    first_examples,
    with_label_noise,
)


def digits(label_noise: float = 0.0, seed: int = 0, train_examples: int | None = None) -> Dataset:
    """The 1,797 digits of 8x8 pixels of 0 to 16 that come with scikit-learn.

    The split is stratified and the same for all seeds: 1,257 to train, 180 to choose the
    checkpoint, 360 to test.

    Args:
        label_noise: share of the training and validation labels replaced by another class.
        seed: of the label noise.
        train_examples: that many of the training examples instead of all.

    Raises:
        DatasetError: if there are not so many training examples.

    References:
        Alpaydin and Kaynak, `Optical Recognition of Handwritten Digits
        <https://doi.org/10.24432/C50P49>`_, UCI Machine Learning Repository, 1998
    """
    # Imported late, for it takes 1 s, of each worker of a stream too.
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = targets.astype(np.int32)
    rest, test = _stratified(np.arange(len(labels)), labels, 360)
    train, validation = _stratified(rest, labels, 180)
    train_rng, validation_rng = np.random.default_rng(seed).spawn(2)
    # Drawn for all examples, so that a smaller subset has the labels of a larger one.
    train_labels = with_label_noise(labels[train], label_noise, 10, train_rng)
    first = first_examples(np.arange(len(train)), train_examples)
    validation_labels = with_label_noise(labels[validation], label_noise, 10, validation_rng)
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
