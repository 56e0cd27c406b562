"""Two gradients computed in parallel, each on one half of the devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bisam_jax._trees import float_part, merge

GradientFn = Callable[[Any, Any], optax.Updates]


def on_two_halves(
    gradient: GradientFn, points: list, batches: list, axis: str
) -> tuple[optax.Updates, optax.Updates]:
    """Returns the gradients at two points on two batches, one on each half of the devices.

    Args:
        gradient: maps parameters and a batch to the gradient of the floating parameters.
        points: two trees of parameters, of the same types.
        batches: two batches, of the same types.
        axis: name of an axis of the mesh in context, of size 2 and type Auto.

    Raises:
        ValueError: if there is no such axis.
    """
    _check_axis(axis)
    floats = [float_part(point) for point in points]

    # Not vmap, since XLA cannot split its convolutions over devices. No checks, since a loss that
    # starts a loop from zeros would have to know the axis.
    @functools.partial(
        jax.shard_map,
        in_specs=P(axis),
        out_specs=P(axis),
        axis_names=frozenset({axis}),
        check_vma=False,
    )
    def of_this_half(stacked: Any) -> optax.Updates:
        floating, batch = jax.tree.map(lambda x: x[0], stacked)
        whole = merge(floating, points[0])
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), gradient(whole, batch))

    pairs = zip(floats, batches, strict=True)
    both = of_this_half(jax.tree.map(functools.partial(_laid_out, axis), *pairs))
    # One exchange between the halves: slicing the sharded arrays would take several.
    both = jax.tree.map(functools.partial(_on_axis, None), both)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in (0, 1))
    return first, second


def _laid_out(axis: str, first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns two arrays stacked, one on each half of the devices."""
    # Each device selects its array locally: for a stack, XLA would send parts between devices.
    half = jax.lax.broadcasted_iota(jnp.int32, (2,) + (1,) * jnp.ndim(first), 0)
    first, second = (jnp.expand_dims(x, 0) for x in (first, second))
    return jnp.where(_on_axis(axis, half) == 0, first, second)


def _on_axis(axis: str | None, x: jax.Array) -> jax.Array:
    """Shards the first axis of an array over a mesh axis, or puts it on both halves if None."""
    return jax.lax.with_sharding_constraint(x, P(axis, *[P.UNCONSTRAINED] * (x.ndim - 1)))


def _check_axis(name: str) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    axes = {
        axis: f"{axis_type.name} of size {size}"
        for axis, size, axis_type in zip(
            mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True
        )
    }
    if axes.get(name) != f"{AxisType.Auto.name} of size 2":
        raise ValueError(
            f"gradient_axis must be an Auto axis of size 2 of the mesh in context, got {name!r} "
            f"where the axes are {axes or 'none'}: make one, such as jax.make_mesh((2, n // 2), "
            f"({name!r}, 'data'), (jax.sharding.AxisType.Auto,) * 2) for n devices, and call "
            "update under jax.jit in jax.set_mesh(mesh)."
        )
