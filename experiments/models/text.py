"""Networks for texts: a transformer, and a bag of tokens to compare it with.

Both take tokens, int[batch, length], of which 0 is padding. What is padded changes nothing.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import Dropout, module_list
from experiments.models.transformer import INIT, TransformerBlock, layer_norm, linear

PADDING = 0  # as in experiments.data.tokens
# The longest wavelength of the rotary positions, in tokens over 2 pi (Su et al.).
ROTARY_BASE = 10_000.0


class TextBag(nnx.Module):
    """The mean of the tokens' embeddings, and a perceptron with one hidden layer.

    Joulin et al., `Bag of Tricks for Efficient Text Classification
    <https://arxiv.org/abs/1607.01759>`_, have no hidden layer.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        vocabulary: int,
        width: int = 128,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        del image_shape
        self.embedding = embedding(vocabulary, width, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, rngs=rngs)
        self.hidden = linear(width, width, dtype=dtype, rngs=rngs)
        self.head = linear(width, classes, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        del train, keys
        pooled = mean_of_tokens(self.embedding(tokens.astype(jnp.int32)), tokens != PADDING)
        return self.head(nnx.relu(self.hidden(self.norm(pooled))))


class TextTransformer(nnx.Module):
    """An encoder with rotary positions; the mean of its last tokens is classified.

    Layer normalization comes first in each half of a block, and last before the head. There is no
    table of positions, so the parameters do not depend on the length.

    References:
        Vaswani et al., `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_; Xiong et
        al., `On Layer Normalization in the Transformer Architecture
        <https://arxiv.org/abs/2002.04745>`_; Su et al., `RoFormer
        <https://arxiv.org/abs/2104.09864>`_
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        vocabulary: int,
        width: int,
        heads: int,
        depth: int,
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        del image_shape
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width / heads must be an even number, got {width} / {heads}")
        self.dropout_rate = dropout
        self.embedding = embedding(vocabulary, width, dtype=dtype, rngs=rngs)
        self.blocks = module_list(
            TransformerBlock(width, heads, dtype=dtype, rngs=rngs) for _ in range(depth)
        )
        self.norm = layer_norm(width, rngs=rngs)
        self.head = linear(width, classes, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        dropout = Dropout(self.dropout_rate, keys, active=train)
        there = tokens != PADDING
        x = dropout(self.embedding(tokens.astype(jnp.int32)))
        for block in self.blocks:
            x = block(x, dropout, there, rotated)
        return self.head(mean_of_tokens(self.norm(x), there))


def embedding(vocabulary: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Embed:
    """Makes one vector per token."""
    return nnx.Embed(vocabulary, width, embedding_init=INIT, dtype=dtype, rngs=rngs)


def mean_of_tokens(x: jax.Array, there: jax.Array) -> jax.Array:
    """Returns the mean of the tokens that are there: [batch, tokens, width] to [batch, width]."""
    weights = there.astype(jnp.float32)[..., None]
    return (x.astype(jnp.float32) * weights).sum(1) / weights.sum(1)


def rotated(x: jax.Array) -> jax.Array:
    """Turns each pair of numbers of a head by an angle that grows with the token's position.

    Products of queries and keys then depend only on the distance of their tokens.

    Args:
        x: [batch, tokens, heads, width], of an even width.
    """
    tokens, width = x.shape[1], x.shape[3]
    frequencies = ROTARY_BASE ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = jnp.arange(tokens, dtype=jnp.float32)[:, None] * frequencies[None]
    cos, sin = (function(angles)[None, :, None] for function in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
