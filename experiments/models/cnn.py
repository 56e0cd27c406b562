"""A small convolutional network with batch normalization."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import BatchNorm, check_image_shape, global_mean, head, module_list


class CNN(nnx.Module):
    """Three 3x3 convolutions, the last two with stride 2, and global average pooling."""

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        width: int = 32,
    ) -> None:
        check_image_shape(image_shape, smallest=4)
        channels = (image_shape[-1], width, 2 * width, 4 * width)
        self.convolutions = module_list(
            nnx.Conv(
                n_in,
                n_out,
                kernel_size=(3, 3),
                strides=1 if layer == 0 else 2,
                use_bias=False,
                kernel_init=nnx.initializers.he_normal(),
                dtype=dtype,
                rngs=rngs,
            )
            for layer, (n_in, n_out) in enumerate(itertools.pairwise(channels))
        )
        self.norms = module_list(BatchNorm(n, rngs=rngs) for n in channels[1:])
        self.head = head(channels[-1], classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x), train=train))
        return self.head(global_mean(x))
