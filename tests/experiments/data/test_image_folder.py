"""Folders of images, and folders of TFDS by their path."""

import numpy as np
import pytest
from PIL import Image

from experiments import data
from experiments.data import Source
from tests.experiments import tiny_dataset

CLASSES = ["cat", "dog", "zebra"]


def write(root, per_class=10, size=(4, 5), mode="RGB", suffix=".png"):
    """Writes images whose first pixel tells class and number."""
    width, height = size
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            image = Image.new(mode, (width, height))
            image.putpixel(
                (0, 0), 10 * label + number if mode == "L" else (10 * label + number, 0, 7)
            )
            image.save(root / name / f"{number:02}{suffix}")


def load(path, **options):
    return data.load(Source(str(path), **options))


def pixels_of(split):
    return [int(image[0, 0, 0]) for image in split.images]


def test_classes_are_subfolders_and_the_parts_are_disjoint(tmp_path):
    write(tmp_path)
    dataset = load(tmp_path)
    assert (dataset.classes, dataset.image_shape) == (3, (5, 4, 3))
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [part.examples for part in parts] == [22, 2, 6]
    for part in parts:
        assert [pixel // 10 for pixel in pixels_of(part)] == part.labels.tolist()
    everything = sorted(pixel for part in parts for pixel in pixels_of(part))
    assert everything == [10 * label + number for label in range(3) for number in range(10)]
    assert load(tmp_path, seed=1).fingerprint == dataset.fingerprint
    noisy = load(tmp_path, label_noise=0.5)
    assert (noisy.train.labels != dataset.train.labels).sum() == 11
    np.testing.assert_array_equal(noisy.test.labels, dataset.test.labels)
    assert load(tmp_path, train_examples=5).train.examples == 5


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_test_part_of_its_own(name, tmp_path):
    write(tmp_path / "train")
    write(tmp_path / name, per_class=2)
    dataset = load(tmp_path)
    assert (dataset.train.examples, dataset.validation.examples) == (27, 3)
    assert sorted(pixels_of(dataset.test)) == [0, 1, 10, 11, 20, 21]


def test_grey_images_have_one_channel(tmp_path):
    write(tmp_path, mode="L")
    assert load(tmp_path).image_shape == (5, 4, 1)


def test_images_of_many_sizes_are_streamed(tmp_path):
    write(tmp_path)
    Image.new("L", (9, 9)).save(tmp_path / "dog" / "large.PNG")
    dataset = load(tmp_path, image_size=8, workers=0)
    assert dataset.train.streamed
    assert dataset.image_shape == (8, 8, 3)
    assert sum(p.examples for p in (dataset.train, dataset.validation, dataset.test)) == 31
    assert load(tmp_path, workers=0).image_shape == (224, 224, 3)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(data.DatasetError, match="there is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(data.DatasetError, match="has 0 subfolders with images"):
        load(tmp_path)
    write(tmp_path / "train")
    with pytest.raises(data.DatasetError, match="has train, but no test"):
        load(tmp_path)
    (tmp_path / "test" / "bird").mkdir(parents=True)
    (tmp_path / "test" / "cat").mkdir(parents=True)
    with pytest.raises(data.DatasetError, match=r"classes without training images: \['bird'\]"):
        load(tmp_path)
    (tmp_path / "test" / "bird").rmdir()
    (tmp_path / "test" / "dog").mkdir(parents=True)
    with pytest.raises(data.DatasetError, match="has 0 image files"):
        load(tmp_path)
    write(tmp_path / "test")
    (tmp_path / "train" / "cat" / "00.png").write_text("no image")
    with pytest.raises(data.DatasetError, match=r"00\.png is no image"):
        load(tmp_path)


@pytest.mark.parametrize("part", ["tiny", "tiny/1.0.0"])
def test_a_folder_of_tfds_by_its_path(part, tmp_path):
    tiny_dataset.write(tmp_path)
    by_path = load(tmp_path / part)
    by_name = data.load(Source("tiny", data_dir=tmp_path))
    np.testing.assert_array_equal(by_path.train.images, by_name.train.images)
    assert data.base_name(str(tmp_path / part)) == "tiny"


def test_a_folder_has_the_defaults_of_a_known_data_set(tmp_path):
    spec = data.dataset_spec(str(tmp_path / "cifar10"))
    assert (spec.crop_padding, spec.load.__name__) == (4, "image_folder")
