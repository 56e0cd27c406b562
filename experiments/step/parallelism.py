"""A training step over many devices, in one of three ways.

jit        one program for the whole batch, which XLA lays over the devices
shard_map  the program of one device; JAX checks what varies over the devices
pmap       the program of one device, in the form that much TPU code still uses
"""

import math

import jax
from jax.sharding import PartitionSpec as P

from experiments.step.layout import DATA, Layout, by_role
from experiments.step.train_step import Batch, Step, TrainState


def over_devices(step: Step, layout: Layout) -> Step:
    """Returns the step on a whole batch over all devices, from the step of one device."""
    match layout.parallelism:
        case "shard_map":
            return _shard_mapped(step, layout)
        case "pmap":
            return _pmapped(step, layout)
    return step


def _shard_mapped(step: Step, layout: Layout) -> Step:
    def step_on_whole(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        specs = by_role(state, lambda _: P(DATA), lambda _: P())
        mapped = jax.shard_map(
            step, mesh=layout.mesh, in_specs=(specs, P(DATA)), out_specs=(specs, P())
        )
        return mapped(state, batch)

    return step_on_whole


def _pmapped(step: Step, layout: Layout) -> Step:
    if jax.__version_info__ < (0, 8):
        # As in later versions. Without it, jit of pmap gathers all arrays on one device.
        jax.config.update("jax_pmap_shmap_merge", True)

    def parted(x: jax.Array) -> jax.Array:
        return x.reshape(layout.parts, -1, *x.shape[1:])

    def whole(x: jax.Array) -> jax.Array:
        return x.reshape(math.prod(x.shape[:2]), *x.shape[2:])

    def step_on_whole(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        axes = by_role(state, lambda _: 0, lambda _: None)
        mapped = jax.pmap(
            step,
            axis_name=DATA,
            in_axes=(axes, 0),
            out_axes=(axes, None),
            devices=layout.mesh.devices.ravel().tolist(),
        )
        state, loss = mapped(by_role(state, parted, lambda x: x), jax.tree.map(parted, batch))
        return by_role(state, whole, lambda x: x), loss

    return step_on_whole
