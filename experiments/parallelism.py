"""A training step over many devices, in one of three ways.

jit        one program for the whole batch, which XLA lays over the devices
shard_map  the program of one device, with checks of what varies over them
pmap       the same as much code on TPUs still has it
"""

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from experiments.devices import OneProgram, PerDevice
from experiments.layout import DATA, Layout
from experiments.training import Batch, Step, TrainState


def devices_of(parallelism: str, layout: Layout, *, shared_statistics: bool) -> OneProgram:
    """What the step that :func:`over_devices` takes has to ask of the devices."""
    if parallelism == "jit":
        return OneProgram()
    return PerDevice(
        DATA,
        layout.parts,
        checked=parallelism == "shard_map",
        shared_statistics=shared_statistics,
    )


def over_devices(step: Step, parallelism: str, layout: Layout) -> Step:
    """A step on a whole batch that lies over the devices, from the step of one of them."""
    match parallelism:
        case "shard_map":
            return _shard_mapped(step, layout)
        case "pmap":
            return _pmapped(step, layout)
    return step


def _shard_mapped(step: Step, layout: Layout) -> Step:
    specs = _state_of(P(), previous_batch=P(DATA))
    return jax.shard_map(step, mesh=layout.mesh, in_specs=(specs, P(DATA)), out_specs=(specs, P()))


def _pmapped(step: Step, layout: Layout) -> Step:
    axes = _state_of(None, previous_batch=0)
    mapped = jax.pmap(
        step,
        axis_name=DATA,
        in_axes=(axes, 0),
        out_axes=(axes, None),
        devices=layout.mesh.devices.ravel().tolist(),
    )

    def parted(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(layout.parts, -1, *x.shape[1:]), tree)

    def whole(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(math.prod(x.shape[:2]), *x.shape[2:]), tree)

    def step_on_whole(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        state = state._replace(previous_batch=parted(state.previous_batch))
        state, loss = mapped(state, parted(batch))
        return state._replace(previous_batch=whole(state.previous_batch)), loss

    return step_on_whole


def _state_of(value: Any, previous_batch: Any) -> Any:
    """`value` for every part of a training state but one."""
    values: dict[str, Any] = dict.fromkeys(TrainState._fields, value)
    return TrainState(**values | {"previous_batch": previous_batch})
