"""Wide residual networks: batch normalization and ReLU before each convolution.

Zagoruyko, Komodakis: Wide Residual Networks, arXiv:1605.07146, without dropout.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import BatchNorm, check_image_shape, global_mean, head, module_list
from experiments.models.layers import convolution as any_convolution

# The authors' code draws kernels of variance 2 / fan_out.
convolution = functools.partial(any_convolution, fan="fan_out")


class WideBlock(nnx.Module):
    """Two 3x3 convolutions. If the width changes, the shortcut is a 1x1 convolution.

    That convolution takes the normalized input, as in the authors' code. Other shortcuts take the
    raw input.
    """

    def __init__(
        self, n_in: int, n_out: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.norm_1 = BatchNorm(n_in, rngs=rngs)
        self.convolution_1 = convolution(n_in, n_out, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.norm_2 = BatchNorm(n_out, rngs=rngs)
        self.convolution_2 = convolution(n_out, n_out, 3, dtype=dtype, rngs=rngs)
        self.shortcut = (
            convolution(n_in, n_out, 1, stride=stride, dtype=dtype, rngs=rngs)
            if n_in != n_out
            else None
        )

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        activated = nnx.relu(self.norm_1(x, train=train))
        y = self.convolution_1(activated)
        y = self.convolution_2(nnx.relu(self.norm_2(y, train=train)))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nnx.Module):
    """`depth` = 6n + 4 layers, with 16, 32 and 64 times `width` channels in the three groups."""

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        depth: int,
        width: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_image_shape(image_shape, smallest=4)
        self.convolution = convolution(image_shape[-1], 16, 3, dtype=dtype, rngs=rngs)
        self.blocks = module_list()
        n_in = 16
        for group, channels in enumerate((16, 32, 64)):
            for number in range((depth - 4) // 6):
                stride = 2 if group > 0 and number == 0 else 1
                n_out = channels * width
                self.blocks.append(WideBlock(n_in, n_out, stride, dtype=dtype, rngs=rngs))
                n_in = n_out
        self.norm = BatchNorm(n_in, rngs=rngs)
        self.head = head(n_in, classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        x = self.convolution(images)
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(global_mean(nnx.relu(self.norm(x, train=train))))
