import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments import augmentation, data


def test_digits_are_split_without_overlap_and_stratified():
    dataset = data.digits()
    sizes = [len(split.labels) for split in dataset[:3]]
    assert sizes == [1257, 180, 360]
    images = np.concatenate([split.images for split in dataset[:3]])
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    for split in dataset[:3]:
        assert split.labels.dtype == np.int32
        counts = np.bincount(split.labels, minlength=10) / len(split.labels)
        assert np.abs(counts - 0.1).max() < 0.02
    original = {image.tobytes() for image in images}
    parts = [{image.tobytes() for image in split.images} for split in dataset[:3]]
    assert sum(map(len, parts)) == len(original)


def test_digits_are_normalised_to_0_to_1():
    dataset = data.load("digits")
    assert (dataset.classes, dataset.image_shape, dataset.name) == (10, (8, 8, 1), "digits")
    normalised = np.asarray(augmentation.normalise(dataset.test.images, dataset.mean, dataset.std))
    pixels = {(image / 16).astype(np.float32).tobytes() for image in load_digits().images}
    assert {image.tobytes() for image in normalised} <= pixels


def test_fewer_digits_are_the_first_of_them():
    all_of_them, few, fewer = (
        data.load("digits", train_examples=count, label_noise=0.5, seed=1)
        for count in (None, 200, 50)
    )
    np.testing.assert_array_equal(few.train.images, all_of_them.train.images[:200])
    np.testing.assert_array_equal(fewer.train.images, few.train.images[:50])
    # The noise too is part of the larger one's.
    np.testing.assert_array_equal(few.train.labels, all_of_them.train.labels[:200])
    np.testing.assert_array_equal(few.validation.labels, all_of_them.validation.labels)
    for left, right in zip(few.test, all_of_them.test, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_label_noise_is_exact_and_spares_the_test_labels(share):
    clean, noisy = data.digits(), data.digits(share, seed=3)
    for name in ("train", "validation"):
        before, after = getattr(clean, name), getattr(noisy, name)
        np.testing.assert_array_equal(before.images, after.images)
        changed = (before.labels != after.labels).sum()
        assert changed == round(share * len(before.labels))
        assert after.labels.dtype == np.int32
    np.testing.assert_array_equal(clean.test.labels, noisy.test.labels)


def test_label_noise_depends_on_the_seed_and_spreads_over_the_other_classes():
    first, again, second = (data.digits(0.4, seed).train.labels for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    labels = np.zeros(9000, np.int32)
    noisy = data.with_label_noise(labels, 1.0, 10, np.random.default_rng(0))
    counts = np.bincount(noisy, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 900


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_examples": 0}, "train_examples must be at least 1 and at most 1257, got 0"),
        ({"train_examples": 1258}, "at most 1257, got 1258"),
        ({"image_size": 16}, "image_size must be 8, got 16"),
    ],
)
def test_what_the_digits_cannot_do(arguments, message):
    with pytest.raises(data.DatasetError, match=message):
        data.load("digits", **arguments)
