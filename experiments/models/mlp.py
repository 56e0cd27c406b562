"""A perceptron with two hidden layers and batch normalisation."""

import itertools
import math

import jax
from flax import nnx


class MLP(nnx.Module):
    """Flattens the images; `width` units, batch normalisation and ReLU in each hidden layer."""

    def __init__(
        self, image_shape: tuple[int, ...], classes: int, *, rngs: nnx.Rngs, width: int = 256
    ) -> None:
        sizes = (math.prod(image_shape), width, width)
        self.hidden = nnx.List(
            nnx.Linear(
                n_in, n_out, use_bias=False, kernel_init=nnx.initializers.he_normal(), rngs=rngs
            )
            for n_in, n_out in itertools.pairwise(sizes)
        )
        self.norms = nnx.List(nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in sizes[1:])
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images.reshape(len(images), -1)
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = nnx.relu(norm(linear(x), use_running_average=not train))
        return self.head(x)
