"""A small convolutional network with batch normalisation."""

import itertools

import jax
from flax import nnx


class CNN(nnx.Module):
    """Three 3x3 convolutions, the last two with stride 2, and global average pooling."""

    def __init__(
        self, image_shape: tuple[int, ...], classes: int, *, rngs: nnx.Rngs, width: int = 32
    ) -> None:
        channels = (image_shape[-1], width, 2 * width, 4 * width)
        self.convolutions = nnx.List(
            nnx.Conv(
                n_in,
                n_out,
                kernel_size=(3, 3),
                strides=1 if layer == 0 else 2,
                use_bias=False,
                kernel_init=nnx.initializers.he_normal(),
                rngs=rngs,
            )
            for layer, (n_in, n_out) in enumerate(itertools.pairwise(channels))
        )
        self.norms = nnx.List(nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in channels[1:])
        self.head = nnx.Linear(channels[-1], classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x), use_running_average=not train))
        return self.head(x.mean(axis=(1, 2)))
