"""A data set from arrays in memory: stratified parts, label noise, fewer training examples."""

import numpy as np

from experiments.data.dataset import Dataset, Source
from experiments.data.splits import SPLIT_SEED, DatasetError, Split, first_examples, label_offsets


def dataset_from_arrays(
    source: Source,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    validation: int,
    test: int | np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
) -> Dataset:
    """Returns a data set whose parts do not depend on the seed. Drawn parts are stratified.

    Args:
        source: the request.
        images: uint8 or float32[examples, height, width, channels], or tokens:
            int[examples, length].
        labels: int[examples].
        classes: number of classes; labels are 0 to `classes - 1`.
        validation: number of examples that choose the checkpoint.
        test: number of test examples to draw, or the indices of a published test part. The rest
            are for training.
        mean: float32[channels], in the units of the images.
        std: float32[channels], in the units of the images.

    Raises:
        DatasetError: if another image size, or more training examples, are requested.
    """
    height, width = images.shape[1:3] if images.ndim == 4 else (0, 0)
    if source.image_size is not None and (height, width) != (source.image_size,) * 2:
        allowed = f"must be {height}" if height == width else "must be left out"
        raise DatasetError(
            f"{source.name} has {height}x{width} pixels: image_size {allowed}, got "
            f"{source.image_size}"
        )
    labels = labels.astype(np.int32)
    everything = np.arange(len(labels))
    if isinstance(test, int):
        rest, test_indices = stratified(everything, labels, test)
    else:
        rest, test_indices = np.setdiff1d(everything, test), test
    train_indices, validation_indices = stratified(rest, labels, validation)
    train_rng, validation_rng = np.random.default_rng(source.seed).spawn(2)

    def noisy(indices: np.ndarray, rng: np.random.Generator) -> Split:
        offsets = label_offsets(len(indices), source.label_noise, classes, rng)
        return Split(images[indices], (labels[indices] + offsets) % classes)

    train = noisy(train_indices, train_rng)
    # After the noise, so that a smaller subset has the labels of a larger one.
    first = first_examples(np.arange(train.examples), source.train_examples)
    return Dataset(
        Split(train.images[first], train.labels[first]),
        noisy(validation_indices, validation_rng),
        Split(images[test_indices], labels[test_indices]),
        classes,
        images.shape[1:],
        mean,
        std,
        source.name,
    )


def stratified(
    indices: np.ndarray, labels: np.ndarray, held_out: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits indices in two, the second of `held_out` examples with all classes' shares."""
    # Imported here because it takes 1 s, also in each worker of a stream.
    from sklearn.model_selection import train_test_split

    kept, out = train_test_split(
        indices, test_size=held_out, stratify=labels[indices], random_state=SPLIT_SEED
    )
    return np.asarray(kept), np.asarray(out)
