import numpy as np
import pytest

from experiments import data


def test_digits_are_split_without_overlap_and_stratified():
    dataset = data.digits()
    sizes = [len(split.labels) for split in dataset[:3]]
    assert sizes == [1257, 180, 360]
    images = np.concatenate([split.images for split in dataset[:3]])
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    for split in dataset[:3]:
        counts = np.bincount(split.labels, minlength=10) / len(split.labels)
        assert np.abs(counts - 0.1).max() < 0.02
    original = {image.tobytes() for image in images}
    parts = [{image.tobytes() for image in split.images} for split in dataset[:3]]
    assert sum(map(len, parts)) == len(original)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_label_noise_is_exact_and_spares_the_test_labels(share):
    clean, noisy = data.digits(), data.digits(share, seed=3)
    for name in ("train", "validation"):
        before, after = getattr(clean, name), getattr(noisy, name)
        np.testing.assert_array_equal(before.images, after.images)
        changed = (before.labels != after.labels).sum()
        assert changed == round(share * len(before.labels))
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
