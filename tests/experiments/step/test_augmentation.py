"""Crops, flips, normalization and Cutout: what they do, how often, and that the key decides."""

import jax
import numpy as np
import pytest

from experiments.step import augmentation

KEY = jax.random.key(0)

random_crop = jax.jit(augmentation.random_crop, static_argnums=2)
random_flip = jax.jit(augmentation.random_flip)
cutout = jax.jit(augmentation.cutout, static_argnums=2)


def test_all_offsets_of_a_crop_are_equally_likely():
    height, width, padding = 5, 7, 2
    image = np.arange(1, height * width * 2 + 1, dtype=np.uint8).reshape(height, width, 2)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    expected = {
        padded[row : row + height, column : column + width].tobytes(): (row, column)
        for row in range(5)
        for column in range(5)
    }
    images = np.broadcast_to(image, (5000, *image.shape))
    cropped = np.asarray(random_crop(KEY, images, padding))
    assert cropped.dtype == np.uint8
    offsets = np.array([expected[crop.tobytes()] for crop in cropped])
    _, counts = np.unique(offsets, axis=0, return_counts=True)
    assert len(counts) == 25
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200)


def test_a_crop_takes_its_own_image():
    images = np.arange(1, 41, dtype=np.uint8).reshape(40, 1, 1, 1) * np.ones((6, 6, 1), np.uint8)
    cropped = np.asarray(random_crop(KEY, images, 1))
    np.testing.assert_array_equal(cropped.max((1, 2, 3)), np.arange(1, 41))
    np.testing.assert_array_equal(random_crop(KEY, images, 0), images)


def test_half_of_the_images_are_mirrored():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2000, 3, 5, 2), np.uint8)
    flipped = np.asarray(random_flip(KEY, images))
    assert flipped.dtype == np.uint8
    changed = (flipped != images).any((1, 2, 3))
    np.testing.assert_array_equal(flipped[changed], images[changed, :, ::-1])
    assert abs(changed.mean() - 0.5) < 0.05


@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_images(channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 3, 2, channels), np.uint8)
    mean, std = (rng.uniform(50, 200, channels).astype(np.float32) for _ in range(2))
    normalised = augmentation.normalise(images, mean, std)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised, (np.float32(images) - mean) / std, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("length", "height", "width"), [(5, 9, 6), (1, 3, 4), (2, 3, 3)])
def test_all_corners_of_a_cut_are_equally_likely(length, height, width):
    half = length // 2
    corners = [(y, x) for y in range(-half, height - half) for x in range(-half, width - half)]
    expected = {}
    for top, left in corners:
        mask = np.ones((height, width, 1), bool)
        mask[max(0, top) : top + length, max(0, left) : left + length] = False
        expected[mask.tobytes()] = (top, left)
    assert len(expected) == len(corners)
    images = np.ones((200 * len(corners), height, width, 2), np.float32)
    cut = np.asarray(cutout(KEY, images, length, 1.0))
    assert cut.dtype == np.float32
    np.testing.assert_array_equal(cut[..., 0], cut[..., 1])
    found = np.array([expected[mask.tobytes()] for mask in cut[..., :1] == 1])
    _, counts = np.unique(found, axis=0, return_counts=True)
    assert len(counts) == len(corners)
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200)


def test_an_image_is_cut_with_the_probability():
    images = np.random.default_rng(0).normal(size=(2000, 18, 18, 1)).astype(np.float32)
    for probability in (0.0, 0.25, 1.0):
        cut = np.asarray(cutout(KEY, images, 16, probability))
        changed = (cut != images).any((1, 2, 3))
        assert abs(changed.mean() - probability) < 0.05
        np.testing.assert_array_equal(cut[cut != 0], images[cut != 0])
    np.testing.assert_array_equal(cutout(KEY, images), cutout(KEY, images, 16, 0.5))


AUGMENTATIONS = {
    "crop": lambda key, images: random_crop(key, images, 4),
    "flip": random_flip,
    "cutout": cutout,
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_only_the_key_decides_on_any_number_of_devices(name):
    fn = AUGMENTATIONS[name]
    images = np.random.default_rng(0).integers(1, 256, (3, 16, 20, 20, 3), np.uint8)
    keys = jax.random.split(KEY, 3)
    one_by_one = [np.asarray(fn(key, batch)) for key, batch in zip(keys, images, strict=True)]
    assert (one_by_one[0] != fn(keys[1], images[0])).any()
    np.testing.assert_array_equal(jax.jit(jax.vmap(fn))(keys, images), one_by_one)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    sharded = jax.jit(fn)(keys[0], jax.device_put(images[0], sharding))
    np.testing.assert_array_equal(sharded, one_by_one[0])
