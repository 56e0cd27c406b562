"""Communication between the devices that share a batch, inside `pmap` or `shard_map`.

Parameters and state are the same on every device, and each device has its own part of the batch.
`jax.jit` on a sharded batch needs none of this: XLA distributes the program over the devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LossesFn = Callable[[Any, Any], jax.Array]


class OneDevice:
    """A step that sees the whole batch."""

    def enter(self, params: Any) -> Any:
        """Returns parameters for which :meth:`mean_loss` has the gradient of the whole batch."""
        return params

    def own(self, tree: Any) -> Any:
        """Returns a device-local tree, whose gradients are those of the device's own examples."""
        return tree

    def mean(self, tree: Any) -> Any:
        """Returns the mean over the devices."""
        return tree

    def mean_loss(self, loss: jax.Array) -> jax.Array:
        """Returns the mean over devices of a loss of parameters returned by :meth:`enter`."""
        return loss

    def total(self, tree: Any) -> Any:
        """Returns the sum over the devices."""
        return tree

    def last(self, leaf: jax.Array) -> jax.Array:
        """Returns the leaf of the device that has the last part of the batch."""
        return leaf

    def joined(self, losses: jax.Array) -> jax.Array:
        """Returns the losses of the whole batch, in its order."""
        return losses

    def losses_at(
        self, losses_fn: LossesFn, params: Any, batch: Any, indices: jax.Array
    ) -> jax.Array:
        """Returns the losses of the examples at `indices` of the whole batch."""
        return losses_fn(params, jax.tree.map(lambda x: take(x, indices), batch))


class OneOfMany(OneDevice):
    """A step that sees one device's part of the batch.

    Args:
        axis_name: name of the mapped axis.
    """

    def __init__(self, axis_name: str) -> None:
        self._axis = axis_name

    @property
    def _number(self) -> int:
        return jax.lax.psum(1, self._axis)

    def enter(self, params: Any) -> Any:
        """See :class:`OneDevice`."""
        if _is_checked(self._axis):
            # With these checks, JAX itself sums gradients over the devices.
            return self.own(params)
        return _with_mean_gradient(params, self._axis)

    def own(self, tree: Any) -> Any:
        """See :class:`OneDevice`."""
        if not _is_checked(self._axis):
            return tree
        return jax.tree.map(lambda x: _varying(x, self._axis), tree)

    def mean(self, tree: Any) -> Any:
        """See :class:`OneDevice`."""
        return jax.lax.pmean(self.own(tree), self._axis)

    def mean_loss(self, loss: jax.Array) -> jax.Array:
        """See :class:`OneDevice`."""
        if _is_checked(self._axis):
            return self.mean(loss)
        return _mean_with_own_gradient(loss, self._axis)

    def total(self, tree: Any) -> Any:
        """See :class:`OneDevice`."""
        return jax.lax.psum(self.own(tree), self._axis)

    def last(self, leaf: jax.Array) -> jax.Array:
        """See :class:`OneDevice`."""
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = self.last(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        is_last = jax.lax.axis_index(self._axis) == self._number - 1
        kept = jnp.where(is_last, leaf, jnp.zeros_like(leaf))
        if leaf.dtype == jnp.bool_:
            return jax.lax.psum(kept.astype(jnp.int32), self._axis) > 0
        return jax.lax.psum(kept, self._axis)

    def joined(self, losses: jax.Array) -> jax.Array:
        """See :class:`OneDevice`."""
        # A sum instead of all_gather: the checks of shard_map know that a sum is the same on all
        # devices.
        places = jnp.zeros((self._number, *losses.shape), losses.dtype)
        places = self.own(places).at[jax.lax.axis_index(self._axis)].set(losses)
        return jax.lax.psum(places, self._axis).reshape(-1)

    def losses_at(
        self, losses_fn: LossesFn, params: Any, batch: Any, indices: jax.Array
    ) -> jax.Array:
        """See :class:`OneDevice`; devices share the work if the indices divide evenly."""
        whole = jax.tree.map(self._gathered, batch)
        count = len(indices)
        if count % self._number:
            return self.mean(super().losses_at(losses_fn, params, whole, indices))
        size = count // self._number
        start = jax.lax.axis_index(self._axis) * size
        share = jax.lax.dynamic_slice_in_dim(self.own(indices), start, size)
        return self.joined(super().losses_at(losses_fn, params, whole, share))

    def _gathered(self, leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = self._gathered(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.lax.all_gather(leaf, self._axis, tiled=True)


def check_axis(axis_name: str) -> None:
    """Raises unless the caller is mapped over the axis.

    Raises:
        ValueError: if the axis is not mapped.
    """
    try:
        jax.lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name {axis_name!r} is not a mapped axis here: call the step inside jax.pmap or "
            "jax.shard_map over it, or leave out axis_name under jax.jit."
        ) from error


def take(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns `x[indices]`, sharded like `x` on an explicit mesh."""
    x = jnp.asarray(x)
    sharding = jax.typeof(x).sharding
    if sharding.mesh.are_all_axes_explicit:
        return x.at[indices].get(out_sharding=sharding)
    return x[indices]


def _is_checked(axis_name: str) -> bool:
    """Returns whether shard_map checks which values vary over the axis."""
    return axis_name in _varies_over(jax.lax.axis_index(axis_name))


def _varies_over(x: Any) -> frozenset:
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):
        return aval.manual_axis_type.varying
    return aval.vma  # JAX 0.7


def _varying(x: Any, axis_name: str) -> Any:
    """Returns a value marked as varying over the axis; JAX 0.7 has no pcast."""
    if axis_name in _varies_over(x):
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axis_name, to="varying")
    return jax.lax.pvary(x, axis_name)  # pyright: ignore[reportAttributeAccessIssue]


def _with_mean_gradient(params: Any, axis_name: str) -> Any:
    """Returns the parameters, with a gradient that is averaged over the devices.

    Without the checks of shard_map, JAX leaves each device with its own gradient.
    """

    @jax.custom_vjp
    def identity(params: Any) -> Any:
        return params

    identity.defvjp(
        lambda params: (params, None), lambda _, gradient: (jax.lax.pmean(gradient, axis_name),)
    )
    return identity(params)


def _mean_with_own_gradient(loss: jax.Array, axis_name: str) -> jax.Array:
    """Returns the mean over the devices, with the gradient of this device's loss.

    The gradients are averaged once, where the parameters enter. JAX would also sum them here.
    """

    @jax.custom_vjp
    def mean(loss: jax.Array) -> jax.Array:
        return jax.lax.pmean(loss, axis_name)

    mean.defvjp(lambda loss: (mean(loss), None), lambda _, cotangent: (cotangent,))
    return mean(loss)
