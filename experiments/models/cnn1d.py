"""A small convolutional network for signals."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import head, module_list

_SIZES = (5, 3, 3)


class CNN1D(nnx.Module):
    """Three convolutions with stride 2 along the width, and a linear layer.

    References:
        The convolutional network of Greydanus and Kobak, `Scaling Down Deep Learning with MNIST-1D
        <https://arxiv.org/abs/2011.14439>`_, ICML 2024: 25 channels, windows of 5, 3 and 3
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        width: int = 25,
    ) -> None:
        if len(image_shape) != 3 or image_shape[0] != 1 or image_shape[1] < 4:
            raise ValueError(
                "image_shape must be (1, width, channels), at least 4 wide: this model takes "
                f"signals, such as --dataset mnist1d; got {tuple(image_shape)}"
            )
        self.convolutions = module_list()
        length = image_shape[1]
        channels = (image_shape[-1], width, width, width)
        for size, (n_in, n_out) in zip(_SIZES, itertools.pairwise(channels), strict=True):
            self.convolutions.append(
                nnx.Conv(
                    n_in,
                    n_out,
                    kernel_size=(1, size),
                    strides=(1, 2),
                    padding=((0, 0), (1, 1)),
                    kernel_init=nnx.initializers.he_normal(),
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            length = (length + 2 - size) // 2 + 1
        self.head = head(length * width, classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        x = images
        for layer in self.convolutions:
            x = nnx.relu(layer(x))
        return self.head(x.reshape(len(x), -1))
