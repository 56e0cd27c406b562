"""Residual networks for small images. Shortcuts have no parameters.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, arXiv:1512.03385, section 4.2,
option A.
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

CHANNELS = (16, 32, 64)


class CifarBlock(nnx.Module):
    """Two 3x3 convolutions; the shortcut takes every `stride`-th pixel and adds zero channels."""

    def __init__(
        self, n_in: int, n_out: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.stride, self.new_channels = stride, n_out - n_in
        self.convolution_1 = convolution(n_in, n_out, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.norm_1 = BatchNorm(n_out, rngs=rngs)
        self.convolution_2 = convolution(n_out, n_out, 3, dtype=dtype, rngs=rngs)
        self.norm_2 = BatchNorm(n_out, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = nnx.relu(self.norm_1(self.convolution_1(x), train=train))
        y = self.norm_2(self.convolution_2(y), train=train)
        shortcut = x[:, :: self.stride, :: self.stride]
        return nnx.relu(y + jnp.pad(shortcut, [(0, 0)] * 3 + [(0, self.new_channels)]))


class CifarResNet(nnx.Module):
    """`depth` = 6n + 2 layers: a 3x3 convolution, three groups of n blocks, and the head."""

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        depth: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_image_shape(image_shape, smallest=4)
        self.convolution = convolution(image_shape[-1], CHANNELS[0], 3, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(CHANNELS[0], rngs=rngs)
        self.blocks = module_list()
        n_in = CHANNELS[0]
        for n_out in CHANNELS:
            for _ in range((depth - 2) // 6):
                stride = 1 if n_in == n_out else 2
                self.blocks.append(CifarBlock(n_in, n_out, stride, dtype=dtype, rngs=rngs))
                n_in = n_out
        self.head = head(n_in, classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        x = nnx.relu(self.norm(self.convolution(images), train=train))
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(global_mean(x))
