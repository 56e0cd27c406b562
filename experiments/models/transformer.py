"""The block of transformers, for images and for texts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import Dropout

Rotate = Callable[[jax.Array], jax.Array]
# DeiT truncates at 2, which is 100 standard deviations: nothing is cut.
INIT = nnx.initializers.normal(0.02)


def linear(n_in: int, n_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(n_in, n_out, kernel_init=INIT, dtype=dtype, rngs=rngs)


def layer_norm(width: int, epsilon: float = 1e-6, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Makes a float32 layer normalization. The linear layer after it casts to its own dtype."""
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


class TransformerBlock(nnx.Module):
    """Self-attention and a perceptron of ratio 4, each after a layer normalization."""

    def __init__(
        self,
        width: int,
        heads: int,
        epsilon: float = 1e-6,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads = heads
        self.norm_1 = layer_norm(width, epsilon, rngs=rngs)
        self.query_key_value = linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.projection = linear(width, width, dtype=dtype, rngs=rngs)
        self.norm_2 = layer_norm(width, epsilon, rngs=rngs)
        self.widen = linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.narrow = linear(4 * width, width, dtype=dtype, rngs=rngs)

    def attention(
        self, x: jax.Array, there: jax.Array | None, rotate: Rotate = lambda x: x
    ) -> jax.Array:
        """Mixes tokens, each with all that are there: [batch, tokens, width] to the same shape."""
        batch, tokens, width = x.shape
        qkv = self.query_key_value(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = (qkv[:, :, number] for number in range(3))
        mask = None if there is None else there[:, None, None]
        mixed = jax.nn.dot_product_attention(rotate(query), rotate(key), value, mask=mask)
        return self.projection(mixed.reshape(x.shape))

    def __call__(
        self,
        x: jax.Array,
        dropout: Dropout,
        there: jax.Array | None = None,
        rotate: Rotate = lambda x: x,
    ) -> jax.Array:
        """Returns the tokens of the next block.

        Args:
            x: [batch, tokens, width].
            dropout: after each of three layers.
            there: bool[batch, tokens], which tokens are no padding; None for all.
            rotate: what is done to queries and keys, [batch, tokens, heads, width of a head].
        """
        x = x + dropout(self.attention(self.norm_1(x), there, rotate))
        y = dropout(nnx.gelu(self.widen(self.norm_2(x)), approximate=False))
        return x + dropout(self.narrow(y))
