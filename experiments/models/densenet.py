"""Densely connected networks, with a first layer for small images.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks,
arXiv:1608.06993, DenseNet-BC.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import (
    BatchNorm,
    check_image_shape,
    convolution,
    global_mean,
    head,
    module_list,
)


class DenseLayer(nnx.Module):
    """Adds `growth` channels: 1x1 convolution to 4 * `growth`, then 3x3."""

    def __init__(self, n_in: int, growth: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm_1 = BatchNorm(n_in, rngs=rngs)
        self.convolution_1 = convolution(n_in, 4 * growth, 1, dtype=dtype, rngs=rngs)
        self.norm_2 = BatchNorm(4 * growth, rngs=rngs)
        self.convolution_2 = convolution(4 * growth, growth, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = self.convolution_1(nnx.relu(self.norm_1(x, train=train)))
        y = self.convolution_2(nnx.relu(self.norm_2(y, train=train)))
        return jnp.concatenate([x, y], axis=-1)


class Transition(nnx.Module):
    """Halves the channels by a 1x1 convolution, and height and width by 2x2 averages."""

    def __init__(self, n_in: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = BatchNorm(n_in, rngs=rngs)
        self.convolution = convolution(n_in, n_in // 2, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = self.convolution(nnx.relu(self.norm(x, train=train)))
        return nnx.avg_pool(x, (2, 2), strides=(2, 2))


class DenseNet(nnx.Module):
    """Blocks with the numbers of layers in `layers`, and a transition between two blocks."""

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        layers: tuple[int, ...],
        growth: int = 32,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_image_shape(image_shape, smallest=2 ** (len(layers) - 1))
        n_in = 2 * growth
        self.convolution = convolution(image_shape[-1], n_in, 3, dtype=dtype, rngs=rngs)
        self.layers = module_list()
        for block, count in enumerate(layers):
            if block > 0:
                self.layers.append(Transition(n_in, dtype=dtype, rngs=rngs))
                n_in //= 2
            for _ in range(count):
                self.layers.append(DenseLayer(n_in, growth, dtype=dtype, rngs=rngs))
                n_in += growth
        self.norm = BatchNorm(n_in, rngs=rngs)
        self.head = head(n_in, classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        x = self.convolution(images)
        for layer in self.layers:
            x = layer(x, train=train)
        return self.head(global_mean(nnx.relu(self.norm(x, train=train))))
