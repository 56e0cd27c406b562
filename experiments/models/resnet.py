"""Residual networks for large images.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, arXiv:1512.03385, table 1. As in
torchvision, a bottleneck has its stride in the 3x3 convolution ("v1.5"), and kernels have variance
2 / fan_out.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import (
    BatchNorm,
    check_image_shape,
    global_mean,
    head,
    max_pool,
    module_list,
)
from experiments.models.layers import convolution as any_convolution

convolution = functools.partial(any_convolution, fan="fan_out")


class Projection(nnx.Module):
    """The shortcut where the shape changes: a 1x1 convolution and batch normalization."""

    def __init__(
        self, n_in: int, n_out: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.convolution = convolution(n_in, n_out, 1, stride=stride, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(n_out, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.norm(self.convolution(x), train=train)


class ResNetBlock(nnx.Module):
    """A basic block: 3x3 and 3x3; or a bottleneck: 1x1, 3x3, and 1x1 to 4 times the `channels`."""

    def __init__(
        self,
        n_in: int,
        channels: int,
        stride: int,
        *,
        bottleneck: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.n_out = 4 * channels if bottleneck else channels
        changes = stride != 1 or n_in != self.n_out
        self.shortcut = (
            Projection(n_in, self.n_out, stride, dtype=dtype, rngs=rngs) if changes else None
        )
        # Channels, size and stride of each convolution.
        shapes = (
            [(channels, 1, 1), (channels, 3, stride), (self.n_out, 1, 1)]
            if bottleneck
            else [(channels, 3, stride), (channels, 3, 1)]
        )
        self.convolutions = module_list()
        self.norms = module_list()
        for n, size, step in shapes:
            self.convolutions.append(
                convolution(n_in, n, size, stride=step, dtype=dtype, rngs=rngs)
            )
            self.norms.append(BatchNorm(n, rngs=rngs))
            n_in = n

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shortcut = x if self.shortcut is None else self.shortcut(x, train=train)
        for layer, norm in zip(self.convolutions, self.norms, strict=True):
            y = norm(layer(x), train=train)
            x = nnx.relu(y)
        return nnx.relu(y + shortcut)


class ResNet(nnx.Module):
    """A 7x7 convolution and a 3x3 maximum, both of stride 2, and four groups of `blocks`."""

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        blocks: tuple[int, ...],
        bottleneck: bool,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        # On a smaller side, one of the five strides would change nothing.
        check_image_shape(image_shape, smallest=17)
        self.convolution = convolution(image_shape[-1], 64, 7, stride=2, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(64, rngs=rngs)
        self.blocks = module_list()
        n_in = 64
        for group, count in enumerate(blocks):
            for number in range(count):
                block = ResNetBlock(
                    n_in,
                    64 * 2**group,
                    2 if group > 0 and number == 0 else 1,
                    bottleneck=bottleneck,
                    dtype=dtype,
                    rngs=rngs,
                )
                self.blocks.append(block)
                n_in = block.n_out
        self.head = head(n_in, classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        x = nnx.relu(self.norm(self.convolution(images), train=train))
        x = max_pool(x, 3)
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(global_mean(x))
