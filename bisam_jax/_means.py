"""Means over the examples of one batch or of several, in microbatches if asked for."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from optax.microbatching import microbatch

from bisam_jax._batches import MEAN, Batch, check_splits, length_of

Mean = Callable[[Callable[[Batch], Any]], Any]


def mean_over(batch: Batch | list[Batch], microbatch_size: int | None = None) -> Mean:
    """Returns `mean(fn)`: the mean of `fn(batch)` over all examples.

    Args:
        batch: a batch; or a list or an iterator of batches, which may differ in size.
        microbatch_size: number of examples in memory at a time; None for a whole batch. It must
            divide every batch.

    Returns:
        A function that maps `fn` to a tree like `fn(batch)`. `fn(batch)` is a tree of floating
        arrays, each a mean over the examples of its batch.

    Raises:
        ValueError: if there is no batch, the size does not divide a batch, or batches differ in
            size and have no common axis of examples.
    """
    batches = list(batch) if isinstance(batch, list | Iterator) else [batch]
    if not batches:
        raise ValueError("batch must be a batch, or a list of at least one batch, got none.")
    if microbatch_size is not None:
        for one in batches:
            check_splits(one, microbatch_size=microbatch_size)
    lengths = [length_of(one) for one in batches]
    if len(batches) > 1 and None in lengths:
        raise ValueError(
            "every batch of several must have an axis of examples, the first of all its arrays, "
            "by which its mean is weighted."
        )
    shares = [1.0] if len(batches) == 1 else [n / sum(lengths) for n in lengths]  # type: ignore[operator, arg-type]

    def of_batch(fn: Callable[[Batch], Any], one: Batch) -> Any:
        if microbatch_size is None or microbatch_size == length_of(one):
            return fn(one)
        return microbatch(fn, 0, microbatch_size, MEAN)(one)

    def mean(fn: Callable[[Batch], Any]) -> Any:
        total = None
        for share, one in zip(shares, batches, strict=True):
            part = jax.tree.map(lambda x, s=share: jnp.asarray(s, x.dtype) * x, of_batch(fn, one))
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return total

    return mean
