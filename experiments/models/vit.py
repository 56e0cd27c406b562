"""Vision transformers in the sizes tiny and small.

Dosovitskiy et al.: An Image is Worth 16x16 Words, arXiv:2010.11929. Sizes, class token and
initialization are those of Touvron et al. (DeiT), arXiv:2012.12877, without distillation and
stochastic depth.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import Dropout, check_image_shape, module_list
from experiments.models.transformer import INIT, TransformerBlock, layer_norm, linear

# PyTorch's default for a convolution, which DeiT keeps for the patch embedding.
PATCH_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ViT(nnx.Module):
    """A transformer on patches of 16x16 pixels, 4x4 if a side is below 64, and a class token.

    `dropout` follows the position embedding, the projection of each attention, and both layers of
    each perceptron.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        width: int,
        heads: int,
        depth: int = 12,
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_image_shape(image_shape, smallest=4)
        height, breadth, channels = image_shape
        self.patch = 16 if min(height, breadth) >= 64 else 4
        if height % self.patch or breadth % self.patch:
            raise ValueError(
                f"height and width must be multiples of the patch, {self.patch}; "
                f"got {height}x{breadth}"
            )
        tokens = (height // self.patch) * (breadth // self.patch) + 1
        # A linear map of each patch equals a convolution with stride = size, and is faster.
        self.embedding = nnx.Linear(
            self.patch**2 * channels, width, kernel_init=PATCH_INIT, dtype=dtype, rngs=rngs
        )
        self.class_token = nnx.Param(INIT(rngs.params(), (1, 1, width), jnp.float32))
        self.positions = nnx.Param(INIT(rngs.params(), (1, tokens, width), jnp.float32))
        self.dropout_rate = dropout
        self.blocks = module_list(
            TransformerBlock(width, heads, dtype=dtype, rngs=rngs) for _ in range(depth)
        )
        self.norm = layer_norm(width, rngs=rngs)
        self.head = linear(width, classes, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        dropout = Dropout(self.dropout_rate, keys, active=train)
        x = self.embedding(patches(images, self.patch))
        class_token = jnp.broadcast_to(self.class_token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([class_token.astype(x.dtype), x], axis=1)
        x = dropout(x + self.positions[...].astype(x.dtype))
        for block in self.blocks:
            x = block(x, dropout)
        return self.head(self.norm(x[:, 0]))


def patches(images: jax.Array, size: int) -> jax.Array:
    """Maps [batch, height, width, channels] to [batch, patches, size**2 * channels], row by row."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)
