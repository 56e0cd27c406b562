"""Image files: random and central parts, and color models."""

import io

import numpy as np
import pytest
from PIL import Image

from experiments.data import image_files
from tests.experiments import tiny_dataset


def test_a_random_part_follows_the_rule():
    rng = np.random.default_rng(0)
    width, height = 400, 300
    boxes = np.array([image_files.random_box((width, height), rng) for _ in range(3000)])
    left, top, right, bottom = boxes.T
    assert min(left.min(), top.min()) == 0
    assert (right.max(), bottom.max()) == (width, height)
    areas = (right - left) * (bottom - top) / (width * height)
    ratios = (right - left) / (bottom - top)
    assert 0.078 < areas.min() < 0.1
    assert areas.max() > 0.9
    assert 0.73 < ratios.min() < 0.77
    assert 1.31 < ratios.max() < 1.36
    small = areas < 0.5
    assert abs(areas[small].mean() - 0.29) < 0.01
    assert abs(np.log(ratios[small]).mean()) < 0.01


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((90, 3), (43, 0, 47, 3)),
        ((3, 90), (0, 43, 3, 47)),
    ],
)
def test_a_part_that_never_fits_becomes_the_central_one(size, box):
    rng = np.random.default_rng(0)
    assert image_files.random_box(size, rng) == box


def test_a_random_part_is_resized_to_the_size():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    result = image_files.random_resized_crop(
        tiny_dataset.encoded(image), 3, (8, 6), np.random.default_rng(5)
    )
    box = image_files.random_box((40, 30), np.random.default_rng(5))
    expected = Image.fromarray(image).resize((6, 8), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(result, np.asarray(expected))


def test_the_centre_is_224_of_256_pixels():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    centre = image_files.centre_crop(tiny_dataset.encoded(image), 3, (28, 28))
    np.testing.assert_array_equal(centre, image[2:30, 10:38])
    tall = image_files.centre_crop(tiny_dataset.encoded(image), 3, (28, 14))
    np.testing.assert_array_equal(tall, image[2:30, 17:31])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_colour_model_becomes_the_channels(mode, channels):
    image = Image.fromarray(np.full((3, 5, 3), 255, np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "tiff" if mode == "CMYK" else "png")
    decoded = image_files.decode(buffer.getvalue(), channels)
    assert decoded.shape == (3, 5, channels)
    assert decoded.dtype == np.uint8
    assert (decoded == 255).all()
