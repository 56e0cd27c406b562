"""A perceptron with batch normalization."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import BatchNorm, head, module_list


class MLP(nnx.Module):
    """`depth` hidden layers on flat images: `width` units, batch normalization and ReLU each."""

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        width: int = 256,
        depth: int = 2,
    ) -> None:
        sizes = (math.prod(image_shape), *[width] * depth)
        self.hidden = module_list(
            nnx.Linear(
                n_in,
                n_out,
                use_bias=False,
                kernel_init=nnx.initializers.he_normal(),
                dtype=dtype,
                rngs=rngs,
            )
            for n_in, n_out in itertools.pairwise(sizes)
        )
        self.norms = module_list(BatchNorm(n, rngs=rngs) for n in sizes[1:])
        self.head = head(width, classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        x = images.reshape(len(images), -1)
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = nnx.relu(norm(linear(x), train=train))
        return self.head(x)
