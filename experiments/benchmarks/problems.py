"""The problems of the benchmarks: networks, and random images or texts."""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bisam_jax
from experiments import data, models

IMAGE_SHAPE = (28, 28, 1)
VOCABULARY, LENGTH = 8192, 64
CLASSES = 10
# The layers of each network in words, and its options.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("784-512-512-10", {"width": 512}),
    "cnn": ("32-64-128", {}),
    "resnet20": ("16-32-64", {}),
    "text-transformer": ("2 blocks, 128 wide, 64 tokens", {"vocabulary": VOCABULARY}),
}


def shape_of(network: str) -> tuple[int, ...]:
    """Returns the shape of an input of a network."""
    reads_texts = models.ARCHITECTURES[network].reads_texts
    return (LENGTH,) if reads_texts else IMAGE_SHAPE


def random_inputs(network: str, examples: int, key: jax.Array) -> jax.Array:
    """Returns random images, float32[examples, 28, 28, 1], or tokens, uint16[examples, 64]."""
    shape = (examples, *shape_of(network))
    if models.ARCHITECTURES[network].reads_texts:
        return jax.random.randint(key, shape, 1, VOCABULARY).astype(jnp.uint16)
    return jax.random.uniform(key, shape)


def losses_of(apply: Callable, stats: Any) -> tuple[Callable, Callable]:
    """Returns L (cross-entropy) and Q (BiSAM's -log), `(params, batch) -> mean`."""

    def mean_of(per_example: Callable) -> Callable:
        def fn(params: Any, batch: data.Split) -> jax.Array:
            logits, _ = apply(params, stats, batch.images, train=True)
            return per_example(logits, batch.labels).mean()

        return fn

    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return mean_of(cross_entropy), mean_of(bisam_jax.perturbation_loss)


def compilers_convolutions() -> contextlib.AbstractContextManager[Any]:
    """Builds models whose convolutions on CPUs are XLA's, as they are on other devices."""
    return mock.patch.object(models, "convolve", jax.lax.conv_general_dilated)


def random_images(examples: int) -> data.Dataset:
    """Returns random images of 32x32x3 in ten classes, the same in all three parts."""
    rng = np.random.default_rng(0)
    split = data.Split(
        rng.integers(0, 256, (examples, 32, 32, 3), np.uint8),
        rng.integers(0, 10, examples, np.int32),
    )
    grey = np.full(3, 127.5, np.float32)
    return data.Dataset(split, split, split, 10, (32, 32, 3), grey, grey, "random")
