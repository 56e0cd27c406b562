"""What a training step asks of the devices that share its batch.

Under `jax.jit` a step is written for the whole batch, and XLA lays it over the devices: it asks for
nothing. Under `jax.shard_map` and `jax.pmap` each device runs the step on its own part of the
batch, and means and gradients have to be taken over all of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LossesFn = Callable[[Any, Any], jax.Array]


class OneProgram:
    """The step sees the whole batch."""

    def enter(self, params: Any) -> Any:
        """The parameters as the step's losses use them: gradients are those of the whole batch."""
        return params

    def mean(self, tree: Any) -> Any:
        """The mean over the devices."""
        return tree

    def statistics(self, stats: Any) -> Any:
        """Batch statistics that are the same on every device."""
        return stats

    def joined(self, losses: jax.Array) -> jax.Array:
        """The losses of all examples, in the batch's order."""
        return losses

    def losses_at(
        self, losses_of: LossesFn, params: Any, batch: Any, indices: jax.Array
    ) -> jax.Array:
        """The losses of the examples at `indices` of the whole batch."""
        return losses_of(params, jax.tree.map(lambda x: x[indices], batch))

    def averaged(self, value_and_grad: Callable) -> Callable:
        """A step in groups of examples, none of which is on two devices."""
        return value_and_grad


class PerDevice(OneProgram):
    """The step sees one device's part of the batch.

    Args:
        axis_name: of the mapped axis.
        parts: its size.
        checked: whether shard_map checks which values vary over the axis. It then sums gradients
            of parameters that do not vary by itself.
        shared_statistics: whether the model takes its batch statistics over all devices.
    """

    def __init__(
        self, axis_name: str, parts: int, *, checked: bool, shared_statistics: bool
    ) -> None:
        self._axis, self._parts = axis_name, parts
        self._checked, self._shared_statistics = checked, shared_statistics

    def enter(self, params: Any) -> Any:
        """See :class:`OneProgram`; of a loss that is a :meth:`mean`, the gradient is too."""
        return self._varying(params) if self._checked else _with_mean_gradient(params, self._axis)

    def mean(self, tree: Any) -> Any:
        """See :class:`OneProgram`."""
        return jax.lax.pmean(tree, self._axis)

    def statistics(self, stats: Any) -> Any:
        """See :class:`OneProgram`."""
        return stats if self._shared_statistics else self.mean(stats)

    def joined(self, losses: jax.Array) -> jax.Array:
        """See :class:`OneProgram`."""
        to = "invarying" if self._checked else "varying"
        return jax.lax.all_gather(losses, self._axis, tiled=True, to=to)

    def losses_at(
        self, losses_of: LossesFn, params: Any, batch: Any, indices: jax.Array
    ) -> jax.Array:
        """See :class:`OneProgram`; the examples are shared out anew, if their number divides."""
        whole = jax.tree.map(lambda x: jax.lax.all_gather(x, self._axis, tiled=True), batch)
        count = len(indices)
        if count % self._parts:
            return self.mean(super().losses_at(losses_of, params, whole, indices))
        part = count // self._parts
        own = jax.lax.dynamic_slice_in_dim(indices, jax.lax.axis_index(self._axis) * part, part)
        return self.joined(super().losses_at(losses_of, params, whole, own))

    def averaged(self, value_and_grad: Callable) -> Callable:
        """See :class:`OneProgram`: the mean over the devices of what their own groups give."""

        def step(params: Any, state: Any, batch: Any) -> tuple:
            # Integers and keys change in the same way on every device.
            state = jax.tree.map(lambda x: x if _is_counter(x) else self._varying(x), state)
            out, grads, state = value_and_grad(self._varying(params), state, batch)
            return out, self.mean(grads), jax.tree.map(self._merged, state)

        return step

    def _varying(self, tree: Any) -> Any:
        if not self._checked:
            return tree
        return jax.tree.map(lambda x: jax.lax.pcast(x, self._axis, to="varying"), tree)

    def _merged(self, leaf: jax.Array) -> jax.Array:
        """As one device would have it: floats the mean over all groups, others the last group's."""
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return self.mean(leaf)
        if _is_counter(leaf):
            return leaf
        last = jax.lax.axis_index(self._axis) == self._parts - 1
        return jax.lax.psum(jnp.where(last, leaf, False).astype(jnp.int32), self._axis) > 0


def _is_counter(leaf: jax.Array) -> bool:
    return not (jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.bool_)


def _with_mean_gradient(params: Any, axis_name: str) -> Any:
    """The identity, whose gradient is the mean over the devices.

    Where nothing checks what varies, JAX takes each device's gradient for a value of its own.
    """

    @jax.custom_vjp
    def identity(params: Any) -> Any:
        return params

    identity.defvjp(
        lambda params: (params, None), lambda _, gradient: (jax.lax.pmean(gradient, axis_name),)
    )
    return identity(params)
