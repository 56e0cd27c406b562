"""Passes over a batch: whole or in microbatches, on one device or on several."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.microbatching import microbatch

from bisam_jax._batches import MEAN, Batch, BatchLoss, BatchLossFn, Parts, aux_rules, check_splits
from bisam_jax._devices import OneDevice, OneOfMany
from bisam_jax._fisher_mask import fisher_scores
from bisam_jax._trees import as_cotangent, float_part


class Clean(NamedTuple):
    """Result of the pass at the parameters of this step.

    Attributes:
        value: the mean loss.
        parts: losses per example and aux; on several devices, those of this device's examples.
        gradient: takes no arguments, returns the gradient of the floating parameters. Without
            microbatches, it costs nothing unless it is called.
    """

    value: jax.Array
    parts: Parts
    gradient: Callable[[], optax.Updates]


class Passes:
    """The passes of one step.

    Args:
        devices: the devices that share the batch.
        microbatch_size: number of examples in memory at a time, or None for all.
    """

    def __init__(self, devices: OneDevice, microbatch_size: int | None) -> None:
        self.devices, self._microbatch_size = devices, microbatch_size

    def clean(self, loss: BatchLoss, params: Any, batch: Batch) -> Clean:
        """Makes the clean pass of a loss."""
        if (size := self._size(batch)) is not None:
            return self._accumulated_clean(loss, params, batch, size)

        def mean(params: Any) -> tuple[jax.Array, Parts]:
            value, parts = loss.with_parts(self.devices.enter(params), batch)
            return self.devices.mean_loss(value), parts

        value, pullback, parts = jax.vjp(mean, params, has_aux=True)
        parts = self.merged(loss, params, batch, parts)
        return Clean(value, parts, lambda: float_part(pullback(jnp.ones_like(value))[0]))

    def _accumulated_clean(self, loss: BatchLoss, params: Any, batch: Batch, size: int) -> Clean:
        rules = aux_rules(loss, params, batch, size)
        differentiate = jax.value_and_grad(loss.with_parts, has_aux=True, allow_int=True)
        accumulate = microbatch(
            _with_float_grad(differentiate), 1, size, ((MEAN, rules.rules), MEAN)
        )
        (value, parts), gradient = accumulate(self.devices.own(params), batch)
        parts = self.merged(loss, params, batch, rules.reshaped(parts))
        gradient = self.devices.mean(gradient)
        return Clean(self.devices.mean(value), parts, lambda: gradient)

    def merged(self, loss: BatchLoss, params: Any, batch: Batch, parts: Parts) -> Parts:
        """Returns the parts; aux without an axis of examples is averaged over the devices."""
        if not isinstance(self.devices, OneOfMany) or not jax.tree.leaves(parts.aux):
            return parts
        check_splits(batch)
        rules = aux_rules(loss, params, batch, 2 * len(jax.tree.leaves(batch)[0]))
        return jax.tree.map(
            lambda rule, leaf: self.devices.mean(leaf) if rule is MEAN else leaf, rules.rules, parts
        )

    def mean(self, fn: BatchLossFn) -> Callable[[Any, Batch], jax.Array]:
        """Returns a function for the mean of `fn` over the whole batch."""

        def mean(params: Any, batch: Batch) -> jax.Array:
            size = self._size(batch)
            part = fn if size is None else _accumulated(fn, size)
            return self.devices.mean_loss(part(self.devices.enter(params), batch))

        return mean

    def losses(
        self, loss: BatchLoss, params: Any, batch: Batch, indices: jax.Array | None = None
    ) -> jax.Array:
        """Returns the losses of all examples of the whole batch, or of those at `indices`."""
        check_splits(batch)
        params = self.devices.enter(params)

        def losses(params: Any, part: Batch) -> jax.Array:
            return _in_parts(loss.losses, params, part, self._microbatch_size)

        if indices is None:
            return self.devices.joined(losses(params, batch))
        return self.devices.losses_at(losses, params, batch, indices)

    def fisher_scores(self, loss: BatchLoss, params: Any, batch: Batch) -> optax.Params:
        """Returns the Fisher scores, summed over all examples of the whole batch."""
        check_splits(batch)

        def loss_of_one(params: Any, example: Batch) -> jax.Array:
            return loss.losses(params, example).mean()

        scores = fisher_scores(loss_of_one, self.devices.own(params), batch)
        return self.devices.total(float_part(scores))

    def _size(self, batch: Batch) -> int | None:
        """Returns the size of a microbatch, or None if the batch is not split."""
        size = self._microbatch_size
        return None if size is None or size == len(jax.tree.leaves(batch)[0]) else size


def _with_float_grad(fn: Callable) -> Callable:
    """Returns `fn`, a `value_and_grad`, with only the :func:`float_part` of its gradient."""

    def with_float_grad(params: Any, batch: Batch) -> tuple[Any, optax.Updates]:
        out, grad = fn(params, batch)
        return out, float_part(grad)

    return with_float_grad


def _accumulated(fn: BatchLossFn, size: int) -> BatchLossFn:
    """Returns the mean of `fn` over microbatches; value and gradient use one at a time."""
    forward = microbatch(fn, 1, size, MEAN)
    differentiate = _with_float_grad(jax.value_and_grad(fn, allow_int=True))
    both = microbatch(differentiate, 1, size, MEAN)

    # JAX's own derivative of the loop would keep all microbatches in memory.
    @jax.custom_vjp
    def mean(params: Any, batch: Batch) -> jax.Array:
        return forward(params, batch)

    def mean_fwd(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
        value, gradient = both(params, batch)
        return value, (gradient, params)

    def mean_bwd(residuals: Any, cotangent: jax.Array) -> tuple[Any, None]:
        gradient, params = residuals
        scaled = jax.tree.map(lambda g: jnp.asarray(cotangent, g.dtype) * g, gradient)
        return as_cotangent(scaled, params), None

    mean.defvjp(mean_fwd, mean_bwd)
    return mean


def _in_parts(losses: BatchLossFn, params: Any, batch: Batch, size: int | None) -> jax.Array:
    """Returns the losses of a batch of any length, at most `size` examples at a time."""
    count = len(jax.tree.leaves(batch)[0])
    if size is None or count <= size:
        return losses(params, batch)
    number = -(-count // size)
    # The last part is padded with the first examples.
    places = jnp.arange(number * size, dtype=jnp.int32) % count
    # Each part takes every `number`-th example, as optax does, and so some of every device.
    parts = jax.tree.map(lambda x: jnp.asarray(x)[places.reshape(size, number).T], batch)
    # The derivative recomputes each part: otherwise all parts would stay in memory.
    part_losses = jax.checkpoint(lambda part: losses(params, part))
    return jax.lax.map(part_losses, parts).T.reshape(-1)[:count]
