"""BERT, in the sizes that pretrained weights have."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import Dropout, module_list
from experiments.models.text import PADDING, embedding
from experiments.models.transformer import INIT, TransformerBlock, layer_norm, linear

EPSILON = 1e-12


class BertBlock(TransformerBlock):
    """A block that normalizes after each half, not before it."""

    def __call__(  # type: ignore[override]
        self, x: jax.Array, dropout: Dropout, there: jax.Array
    ) -> jax.Array:
        x = self.norm_1(x + dropout(self.attention(x, there)))
        y = nnx.gelu(self.widen(x), approximate=False)
        return self.norm_2(x + dropout(self.narrow(y)))


class Bert(nnx.Module):
    """An encoder with learned positions, whose first token is classified.

    Tokens have one segment, and attention has no dropout.

    References:
        Devlin et al., `BERT: Pre-training of Deep Bidirectional Transformers for Language
        Understanding <https://arxiv.org/abs/1810.04805>`_; the small sizes: Turc et al.,
        `Well-Read Students Learn Better <https://arxiv.org/abs/1908.08962>`_
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
        positions: int = 512,
        dropout: float = 0.1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        (length,) = image_shape
        if length > positions:
            raise ValueError(f"it takes texts of at most {positions} tokens, got {length}")
        self.dropout_rate = dropout
        self.embedding = embedding(vocabulary, width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Param(INIT(rngs.params(), (1, positions, width), jnp.float32))
        self.segment = nnx.Param(INIT(rngs.params(), (width,), jnp.float32))
        self.norm = layer_norm(width, EPSILON, rngs=rngs)
        self.blocks = module_list(
            BertBlock(width, heads, EPSILON, dtype=dtype, rngs=rngs) for _ in range(depth)
        )
        self.pooler = linear(width, width, dtype=dtype, rngs=rngs)
        self.head = linear(width, classes, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        dropout = Dropout(self.dropout_rate, keys, active=train)
        x = self.embedding(tokens.astype(jnp.int32)).astype(jnp.float32)
        x = x + self.positions[...][:, : tokens.shape[1]] + self.segment[...][None, None]
        x = dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, dropout, tokens != PADDING)
        return self.head(dropout(jnp.tanh(self.pooler(x[:, 0]))))
