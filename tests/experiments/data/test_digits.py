"""scikit-learn's digits, and what every data set in memory does with its arrays."""

import itertools

import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments import data
from experiments.data.arrays import dataset_from_arrays
from experiments.data.digits import digits
from experiments.data.splits import label_offsets
from experiments.step import augmentation


def load(**options):
    return data.load(data.Source("digits", **options))


def test_digits_are_split_without_overlap_and_stratified():
    dataset = load()
    assert [part.examples for part in dataset[:3]] == [1257, 180, 360]
    images = np.concatenate([part.images for part in dataset[:3]])
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    for part in dataset[:3]:
        assert part.labels.dtype == np.int32
        counts = np.bincount(part.labels, minlength=10) / part.examples
        assert np.abs(counts - 0.1).max() < 0.02
    # No digit occurs twice.
    assert len({image.tobytes() for image in images}) == 1797


def test_every_digit_keeps_its_label():
    pixels, labels = load_digits(return_X_y=True)
    labels_of = dict(zip((row.astype(np.uint8).tobytes() for row in pixels), labels, strict=True))
    for part in load()[:3]:
        assert [labels_of[image.tobytes()] for image in part.images] == part.labels.tolist()


def test_digits_are_normalised_to_0_to_1():
    dataset = load()
    assert (dataset.classes, dataset.image_shape, dataset.name) == (10, (8, 8, 1), "digits")
    normalised = np.asarray(augmentation.normalise(dataset.test.images, dataset.mean, dataset.std))
    pixels = {(image / 16).astype(np.float32).tobytes() for image in load_digits().images}
    assert {image.tobytes() for image in normalised} <= pixels


def test_fewer_digits_are_the_first_of_them():
    complete, few, fewer = (
        load(train_examples=count, label_noise=0.5, seed=1) for count in (None, 200, 50)
    )
    np.testing.assert_array_equal(few.train.images, complete.train.images[:200])
    np.testing.assert_array_equal(fewer.train.images, few.train.images[:50])
    # Their labels have the same noise.
    np.testing.assert_array_equal(few.train.labels, complete.train.labels[:200])
    np.testing.assert_array_equal(few.validation.labels, complete.validation.labels)
    for left, right in zip(few.test, complete.test, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_label_noise_is_exact_and_spares_the_test_labels(share):
    clean, noisy = load(), load(label_noise=share, seed=3)
    for name in ("train", "validation"):
        before, after = getattr(clean, name), getattr(noisy, name)
        np.testing.assert_array_equal(before.images, after.images)
        assert (before.labels != after.labels).sum() == round(share * before.examples)
        assert after.labels.dtype == np.int32
    np.testing.assert_array_equal(clean.test.labels, noisy.test.labels)


def test_label_noise_depends_on_the_seed_and_spreads_over_the_other_classes():
    first, again, second = (load(label_noise=0.4, seed=seed).train.labels for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    offsets = label_offsets(9000, 1.0, 10, np.random.default_rng(0))
    counts = np.bincount(offsets, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 900


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_examples": 0}, "train_examples must be at least 1 and at most 1257, got 0"),
        ({"train_examples": 1258}, "at most 1257, got 1258"),
        ({"image_size": 16}, "digits has 8x8 pixels: image_size must be 8, got 16"),
    ],
    ids=["none", "too many", "size"],
)
def test_requests_that_the_digits_cannot_meet(arguments, message):
    with pytest.raises(data.DatasetError, match=message):
        load(**arguments)


def test_the_digits_have_no_version():
    with pytest.raises(data.DatasetError, match=r"use 'digits', got 'digits:1\.0\.0'"):
        digits(data.Source("digits:1.0.0"))


def test_arrays_of_any_size():
    """Each part holds other examples, with the given mean and standard deviation."""
    images = np.arange(60, dtype=np.uint8)[:, None, None, None] * np.ones((2, 3, 3), np.uint8)
    labels, source = np.arange(60) % 3, data.Source("made")
    mean, std = np.float32([1, 2, 3]), np.float32([4, 5, 6])
    options = {"classes": 3, "validation": 6, "test": 15, "mean": mean, "std": std}
    dataset = dataset_from_arrays(source, images, labels, **options)
    numbers = [part.images[:, 0, 0, 0].tolist() for part in dataset[:3]]
    assert [len(part) for part in numbers] == [39, 6, 15]
    assert sorted(itertools.chain(*numbers)) == list(range(60))
    for part, shown in zip(dataset[:3], numbers, strict=True):
        np.testing.assert_array_equal(part.labels, labels[shown])
    assert (dataset.image_shape, dataset.classes, dataset.name) == ((2, 3, 3), 3, "made")
    assert dataset.mean is mean
    assert dataset.std is std
    with pytest.raises(data.DatasetError, match="made has 2x3 pixels"):
        dataset_from_arrays(data.Source("made", image_size=2), images, labels, **options)


def test_the_fingerprint_changes_with_every_byte():
    dataset = load(train_examples=50)
    assert dataset.fingerprint == load(train_examples=50).fingerprint
    assert dataset.fingerprint != load(train_examples=51).fingerprint
    for name in ("train", "validation", "test"):
        for field in ("images", "labels"):
            part = getattr(dataset, name)
            array = getattr(part, field).copy()
            array[-1] += 1
            other = dataset._replace(**{name: part._replace(**{field: array})})
            assert other.fingerprint != dataset.fingerprint
