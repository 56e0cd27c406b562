"""Data sets prepared by TFDS, in memory."""

import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import data
from experiments.data import image_files
from tests.experiments import tiny_dataset

PICTURE = tiny_dataset.encoded(np.zeros((4, 4, 3), np.uint8))
IMAGE = tfds.features.Image(shape=(4, 4, 3))
LABEL = tfds.features.ClassLabel(num_classes=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder, the images and the labels of a data set."""
    folder = tmp_path_factory.mktemp("data")
    return folder, tiny_dataset.write(folder)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def load(name, folder=None, **options):
    return data.load(data.Source(name, data_dir=folder, **options))


def by_image(split, labels):
    return {image.tobytes(): int(label) for image, label in zip(split, labels, strict=True)}


def test_pixels_labels_and_split(written):
    folder, original = written
    dataset = load("tiny", folder)
    assert (dataset.classes, dataset.image_shape, dataset.name) == (4, (12, 12, 3), "tiny")
    for split, size in zip(dataset[:3], (54, 6, 20), strict=True):
        assert split.images.shape == (size, 12, 12, 3)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.test.images, original["test"][0])
    np.testing.assert_array_equal(dataset.test.labels, original["test"][1])
    train, validation = by_image(*dataset.train), by_image(*dataset.validation)
    assert not train.keys() & validation.keys()
    assert train | validation == by_image(*original["train"])
    assert (dataset.train.images[:54] != np.asarray(original["train"][0])[:54]).any()


def test_the_statistics_are_those_of_the_training_images(written):
    dataset = load("tiny", written[0])
    pixels = dataset.train.images.reshape(-1, 3).astype(np.float64)
    assert dataset.mean.dtype == dataset.std.dtype == np.float32
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=1e-6)


def test_known_statistics_and_one_channel(tmp_path):
    original = tiny_dataset.write(tmp_path, "fashion_mnist", channels=1)
    dataset = load("fashion_mnist", tmp_path)
    np.testing.assert_array_equal(dataset.test.images, original["test"][0])
    np.testing.assert_allclose(dataset.mean, [255 * 0.2860], rtol=1e-6)
    np.testing.assert_allclose(dataset.std, [255 * 0.3530], rtol=1e-6)


def test_images_without_contrast_can_be_normalised(tmp_path):
    examples = [{"image": PICTURE, "label": 0}] * 10
    features = {"image": IMAGE, "label": LABEL}
    tiny_dataset.build(tmp_path, "black", features, {"train": examples, "test": examples})
    dataset = load("black", tmp_path)
    assert (*dataset.mean, *dataset.std) == (0, 0, 0, 1, 1, 1)


def test_a_smaller_subset_is_part_of_a_larger_one_and_nothing_else_is_decoded(written, monkeypatch):
    def first(count):
        return load("tiny", written[0], train_examples=count)

    complete = first(None)
    decoded = []
    decode = image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda *args: decoded.append(1) or decode(*args))
    for count in (30, 7):
        decoded.clear()
        subset = first(count)
        np.testing.assert_array_equal(subset.train.images, complete.train.images[:count])
        np.testing.assert_array_equal(subset.validation.images, complete.validation.images)
        assert len(decoded) == count + 6 + 20
    for count in (0, -1, 55):
        with pytest.raises(data.DatasetError, match=f"at least 1 and at most 54, got {count}"):
            first(count)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_label_noise_is_exact_and_spares_the_test_labels(written, share):
    clean, noisy, again, other = (
        load("tiny", written[0], label_noise=noise, seed=seed)
        for noise, seed in ((0.0, 0), (share, 0), (share, 0), (share, 1))
    )
    for name in ("train", "validation"):
        before, after = getattr(clean, name), getattr(noisy, name)
        np.testing.assert_array_equal(before.images, after.images)
        assert (before.labels != after.labels).sum() == round(share * len(before.labels))
    np.testing.assert_array_equal(noisy.test.labels, clean.test.labels)
    np.testing.assert_array_equal(noisy.train.labels, again.train.labels)
    assert (noisy.train.labels != other.train.labels).any()


def test_the_newest_version_unless_another_is_asked_for(tmp_path):
    for train, version in ((10, "1.9.0"), (20, "1.10.0"), (30, "1.2.0")):
        tiny_dataset.write(tmp_path, train=train, version=version)
    (tmp_path / "tiny" / "2.0.0").mkdir()
    assert load("tiny", tmp_path).train.examples == 18
    assert load("tiny:1.2.0", tmp_path).train.examples == 27
    with pytest.raises(data.DatasetError, match=r"there is no tiny:1\.0\.0 in"):
        load("tiny:1.0.0", tmp_path)


def test_configurations(tmp_path):
    tiny_dataset.write(tmp_path, train=10, config="small")
    assert load("tiny", tmp_path).train.examples == 9
    tiny_dataset.write(tmp_path, train=20, config="large-v2")
    assert load("tiny/large-v2", tmp_path).train.examples == 18
    assert load("tiny/small:1.0.0", tmp_path).train.examples == 9
    with pytest.raises(data.DatasetError, match=r"name one: tiny/large-v2, tiny/small$"):
        load("tiny", tmp_path)


def test_where_tfds_puts_its_data(written, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(written[0]))
    assert load("tiny").classes == 4
    monkeypatch.delenv("TFDS_DATA_DIR")
    with pytest.raises(data.DatasetError, match="/tensorflow_datasets: prepare it"):
        load("there_is_none_of_that_name")


@pytest.mark.parametrize("name", ["cifar10", "imagenette/full-size-v2", "mnist:3.0.1"])
def test_the_message_about_a_missing_data_set_says_how_to_prepare_it(name, tmp_path):
    with pytest.raises(data.DatasetError) as error:
        load(name, tmp_path)
    message = str(error.value)
    assert message.startswith(f"there is no {name} in {tmp_path}")
    assert "pip install tensorflow tensorflow-datasets" in message
    assert (
        f"tfds.builder('{name}', data_dir='{tmp_path}', file_format='array_record')"
        ".download_and_prepare()" in message
    )


@pytest.mark.parametrize("name", ["", "tiny/..", "tiny:1", "a b", "CIFAR10"])
def test_names_of_no_data_set(name, tmp_path):
    with pytest.raises(data.DatasetError, match="names no data set"):
        load(name, tmp_path)


def test_another_file_format(tmp_path):
    tiny_dataset.write(tmp_path, file_format="parquet")
    with pytest.raises(data.DatasetError, match="parquet, not array_record") as error:
        load("tiny", tmp_path)
    assert "file_format='array_record'" in str(error.value)


def test_files_that_are_gone(tmp_path):
    tiny_dataset.write(tmp_path)
    for path in (tmp_path / "tiny" / "1.0.0").glob("*array_record*"):
        path.unlink()
    with pytest.raises(data.DatasetError, match="cannot be read"):
        load("tiny", tmp_path)


def test_the_supervised_keys_come_first_and_then_the_usual_names(tmp_path):
    features = {
        "image": IMAGE,
        "mask": tfds.features.Image(shape=(4, 4, 1)),
        "label": LABEL,
        "coarse_label": LABEL,
    }
    mask = tiny_dataset.encoded(np.ones((4, 4, 1), np.uint8))
    example = {"image": PICTURE, "mask": mask, "label": 0, "coarse_label": 1}
    splits = {"train": [example] * 10, "test": [example] * 2}
    for name, keys, label in (("a", None, 0), ("b", ("image", "coarse_label"), 1)):
        tiny_dataset.build(tmp_path, name, features, splits, supervised_keys=keys)
        dataset = load(name, tmp_path)
        assert dataset.image_shape == (4, 4, 3)
        assert set(dataset.train.labels) == {label}


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": IMAGE}, r"should have one ClassLabel, but has \[\]"),
        ({"label": LABEL}, r"should have one Image, but has \[\]"),
        ({"a": IMAGE, "b": IMAGE, "label": LABEL}, r"one Image, but has \['a', 'b'\]"),
        (
            {"image": tfds.features.Image(shape=(4, 4, 3), dtype=np.uint16), "label": LABEL},
            r"should be uint8 with 1, 3, 4 channels, but are uint16 of shape \(4, 4, 3\)",
        ),
    ],
)
def test_other_data_sets_than_image_classification(features, message, tmp_path):
    values = {key: 0 if feature is LABEL else PICTURE for key, feature in features.items()}
    tiny_dataset.build(tmp_path, "other", features, {"train": [values] * 10, "test": [values]})
    with pytest.raises(data.DatasetError, match=message):
        load("other", tmp_path)


def test_the_held_out_split_is_one_with_labels(tmp_path):
    features = {"image": IMAGE, "label": LABEL}
    labelled, unlabelled = ({"image": PICTURE, "label": label} for label in (1, -1))
    splits = {"train": [labelled] * 10, "test": [unlabelled] * 2, "validation": [labelled] * 3}
    tiny_dataset.build(tmp_path, "like_imagenet", features, splits)
    np.testing.assert_array_equal(load("like_imagenet", tmp_path).test.labels, [1, 1, 1])
    splits["test"] = [labelled] * 2
    tiny_dataset.build(tmp_path, "both", features, splits)
    assert load("both", tmp_path).test.examples == 2
    splits = {"train": [labelled] * 10, "test": [unlabelled] * 2}
    tiny_dataset.build(tmp_path, "no_labels", features, splits)
    with pytest.raises(data.DatasetError, match="should have the split train, and test or valid"):
        load("no_labels", tmp_path)
    splits = {"train": [unlabelled] * 10, "test": [labelled]}
    tiny_dataset.build(tmp_path, "worse", features, splits)
    with pytest.raises(data.DatasetError, match="a label should be 0 to 1, but is -1"):
        load("worse", tmp_path)
