"""VGG with batch normalization, for small images.

Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition,
arXiv:1409.1556, configuration E. The narrow classifier is that of the usual port to CIFAR,
https://github.com/chengyangfu/pytorch-vgg-cifar10.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import (
    BatchNorm,
    Dropout,
    check_image_shape,
    convolution,
    global_mean,
    head,
    max_pool,
    module_list,
)

CHANNELS = (64, 128, 256, 512, 512)


class VGG(nnx.Module):
    """Five groups of 3x3 convolutions, a 2x2 maximum after each, and three linear layers.

    Maxima keep the last row of an odd side: 28x28 ends at one pixel, as 32x32 does. Larger images
    end at several pixels, which are averaged. `dropout` precedes the first two linear layers.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        convolutions: tuple[int, ...] = (2, 2, 4, 4, 4),
        dropout: float = 0.5,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        # On a smaller side, one of the five maxima would change nothing.
        check_image_shape(image_shape, smallest=17)
        self.group_sizes = convolutions
        self.convolutions = module_list()
        self.norms = module_list()
        n_in = image_shape[-1]
        for n_out, count in zip(CHANNELS, convolutions, strict=True):
            for _ in range(count):
                self.convolutions.append(
                    convolution(
                        n_in, n_out, 3, fan="fan_out", use_bias=True, dtype=dtype, rngs=rngs
                    )
                )
                self.norms.append(BatchNorm(n_out, rngs=rngs))
                n_in = n_out
        self.dropout_rate = dropout
        self.hidden = module_list(
            nnx.Linear(n_in, n_in, kernel_init=nnx.initializers.he_normal(), dtype=dtype, rngs=rngs)
            for _ in range(2)
        )
        self.head = head(n_in, classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        dropout = Dropout(self.dropout_rate, keys, active=train)
        layers = iter(zip(self.convolutions, self.norms, strict=True))
        x = images
        for size in self.group_sizes:
            for layer, norm in itertools.islice(layers, size):
                x = nnx.relu(norm(layer(x), train=train))
            x = max_pool(x, 2)
        x = global_mean(x)
        for linear in self.hidden:
            x = nnx.relu(linear(dropout(x)))
        return self.head(x)
