"""Decodes image files: whole, cropped at random, or the central part."""

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
    """Returns the image as uint8[height, width, channels], for any color model of the file."""
    return _pixels(_open(file, channels))


def random_resized_crop(
    file: bytes, channels: int, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Returns a random part of the image, resized: uint8[height, width, channels].

    Args:
        file: the encoded image.
        channels: number of channels of the result.
        size: height and width of the result.
        rng: draws the part. Its area is uniform in 8 to 100 % of the image, and its ratio of
            width to height is log-uniform in 3/4 to 4/3.

    References:
        Szegedy et al., `Going Deeper with Convolutions <https://arxiv.org/abs/1409.4842>`_, 2015.
        Parts that do not fit are drawn again, as in torchvision's `RandomResizedCrop`. After ten
        draws the result is the largest central part with a ratio in the range.
    """
    image = _open(file, channels)
    return _resized(image, random_box(image.size, rng), size)


def centre_crop(file: bytes, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Returns the central part of the image, resized: uint8[height, width, channels].

    The part is that of a resize to cover 256/224 of `size` and a central crop, but with only one
    interpolation.
    """
    image = _open(file, channels)
    width, height = image.size
    scale = CENTRE * min(height / size[0], width / size[1])
    return _resized(image, _centred(image.size, scale * size[1], scale * size[0]), size)


def random_box(image_size: tuple[int, int], rng: np.random.Generator) -> Box:
    """Returns left, top, right and bottom of a random part of an image (width, height)."""
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
