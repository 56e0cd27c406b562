"""Data sets, split and held in memory."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SPLIT_SEED = 0


class Split(NamedTuple):
    """Images, float32[examples, height, width, channels] in [0, 1], and labels, int32[examples].

    NumPy arrays until :func:`on_device`.
    """

    images: Any
    labels: Any


class Dataset(NamedTuple):
    """Three disjoint splits. Label noise is in train and validation alone."""

    train: Split
    validation: Split
    test: Split
    classes: int


def digits(label_noise: float = 0.0, seed: int = 0) -> Dataset:
    """The 1,797 digits of 8x8 pixels that come with scikit-learn.

    The split is stratified and the same for all seeds: 1,257 to train, 180 to choose the
    checkpoint, 360 to test.

    Args:
        label_noise: share of the training and validation labels replaced by another class.
        seed: of the label noise.

    References:
        Alpaydin and Kaynak, `Optical Recognition of Handwritten Digits
        <https://doi.org/10.24432/C50P49>`_, UCI Machine Learning Repository, 1998
    """
    pixels, targets = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    labels = targets.astype(np.int32)
    rest, test = _stratified(np.arange(len(labels)), labels, 360)
    train, validation = _stratified(rest, labels, 180)
    noisy = labels.copy()
    rng = np.random.default_rng(seed)
    for part in (train, validation):
        noisy[part] = with_label_noise(labels[part], label_noise, 10, rng)
    return Dataset(
        train=Split(images[train], noisy[train]),
        validation=Split(images[validation], noisy[validation]),
        test=Split(images[test], labels[test]),
        classes=10,
    )


def with_label_noise(
    labels: np.ndarray, share: float, classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Replaces `round(share * len(labels))` labels, each by any other class alike."""
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    return noisy


def on_device(split: Split) -> Split:
    """The split as device arrays."""
    return Split(jnp.asarray(split.images), jnp.asarray(split.labels))


def _stratified(
    indices: np.ndarray, labels: np.ndarray, held_out: int
) -> tuple[np.ndarray, np.ndarray]:
    kept, out = train_test_split(
        indices, test_size=held_out, stratify=labels[indices], random_state=SPLIT_SEED
    )
    return np.asarray(kept), np.asarray(out)
