"""LoRA: low-rank updates of kernels, added to a model in its pure form.

Hu et al., `LoRA: Low-Rank Adaptation of Large Language Models
<https://arxiv.org/abs/2106.09685>`_.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.models.trees import Path, flat, nested

# Parameters of the updates: LORA / path of the layer / "a" and "b".
LORA = "lora"


def with_lora(init: Any, apply: Any, rank: int) -> tuple[Any, Any]:
    """Returns a model whose linear layers, except `head`, have the kernels W + A B.

    A is uniform, as a linear layer's kernel in PyTorch, and B is zero, so the new model is the
    old one. Both train with the learning rate of the rest: the paper's alpha equals the rank.

    Args:
        init: see :func:`experiments.models.build`.
        apply: see :func:`experiments.models.build`.
        rank: number of columns of A.
    """

    def init_with(key: jax.Array) -> tuple[Any, Any]:
        params, stats = init(key)
        updates = {}
        for path, kernel in flat(params).items():
            if path[-1] != "kernel" or kernel.ndim != 2 or path[0] == "head":
                continue
            n_in, n_out = kernel.shape
            own = jax.random.fold_in(key, zlib.crc32(repr(path).encode()))
            bound = 1 / math.sqrt(n_in)
            a = jax.random.uniform(own, (n_in, rank), kernel.dtype, -bound, bound)
            updates[(LORA, *path[:-1], "a")] = a
            updates[(LORA, *path[:-1], "b")] = jnp.zeros((rank, n_out), kernel.dtype)
        if not updates:
            raise ValueError("it has no linear layer that LoRA could update")
        return nested(flat(params) | updates), stats

    def apply_with(params: Any, *args: Any, **options: Any) -> tuple[jax.Array, Any]:
        return apply(nested(without_lora(flat(params))), *args, **options)

    return init_with, apply_with


def without_lora(leaves: Mapping[Path, Any]) -> dict[Path, Any]:
    """Returns the leaves of the model without LoRA: each update is added to its kernel."""
    own = {path: leaf for path, leaf in leaves.items() if path[0] != LORA}
    for path in leaves:
        if path[0] == LORA and path[-1] == "a":
            a, b = leaves[path], leaves[(*path[:-1], "b")]
            own[(*path[1:-1], "kernel")] += a @ b
    return own
