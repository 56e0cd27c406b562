"""Image files to arrays: whole, cropped at random, or the centre."""

import io
import math

import numpy as np
from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}

CENTRE = 224 / 256
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)

Box = tuple[float, float, float, float]


def decode(file: bytes, channels: int) -> np.ndarray:
    """The image as uint8[height, width, channels], whatever the file's colour model."""
    return _pixels(_open(file, channels))


def random_resized_crop(
    file: bytes, channels: int, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """A random part of the image, resized: uint8[height, width, channels].

    Args:
        file: the encoded image.
        channels: of the result.
        size: height and width of the result.
        rng: for the part, whose area is uniform in 8 to 100 % of the image and whose ratio of
            width to height is log-uniform in 3/4 to 4/3.

    References:
        Szegedy et al., `Going Deeper with Convolutions <https://arxiv.org/abs/1409.4842>`_, 2015;
        with the rule of torchvision's `RandomResizedCrop` for parts that do not fit: the tenth
        leads to the largest central part of a ratio within the range.
    """
    image = _open(file, channels)
    return _resized(image, random_box(image.size, rng), size)


def centre_crop(file: bytes, channels: int, size: tuple[int, int]) -> np.ndarray:
    """The central part of the image, resized: uint8[height, width, channels].

    It is what results from resizing to 256/224 of the `size` that is to be covered and cutting
    off the border, but in one interpolation.
    """
    image = _open(file, channels)
    width, height = image.size
    scale = CENTRE * min(height / size[0], width / size[1])
    return _resized(image, _centred(image.size, scale * size[1], scale * size[0]), size)


def random_box(image_size: tuple[int, int], rng: np.random.Generator) -> Box:
    """Left, top, right and bottom of the random part of an image of that width and height."""
    width, height = image_size
    for _ in range(10):
        area = width * height * rng.uniform(SCALE[0], SCALE[1])
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return (left, top, left + w, top + h)
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return _centred(image_size, w, h)


def _centred(image_size: tuple[int, int], width: float, height: float) -> Box:
    left, top = (image_size[0] - width) / 2, (image_size[1] - height) / 2
    return (left, top, left + width, top + height)


def _open(file: bytes, channels: int) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def _resized(image: Image.Image, box: Box, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    return _pixels(image.resize((width, height), Image.Resampling.BILINEAR, box=box))


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
