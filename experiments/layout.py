"""How a run lies over devices.

The devices form a mesh of three axes:

gradients   a method's two parallel gradients, each on one half of the devices; else of size 1
data        parts of the batch
fsdp        parts of the parameters and of everything that has their shapes

A batch lies over `data`, and over `fsdp` too where its activations outweigh the parameters: XLA
then gathers parameters on every device as it needs them. Elsewhere the parameters stay where they
are, none is ever whole, and activations move.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config import ArgumentError, Config
from experiments.data import Split
from experiments.methods import METHODS
from experiments.models import ARCHITECTURES
from experiments.training import TrainState

GRADIENTS, DATA, FSDP = "gradients", "data", "fsdp"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and what lies where on it; :func:`layout_of` makes one from a configuration.

    Attributes:
        mesh: of the axes above.
        batch_axes: those over which batches lie.
    """

    mesh: Mesh
    batch_axes: tuple[str, ...] = (DATA,)

    @property
    def parts(self) -> int:
        """The number of parts of a batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    @property
    def whole(self) -> NamedSharding:
        """All of an array on every device."""
        return NamedSharding(self.mesh, P())

    @property
    def split(self) -> NamedSharding:
        """The first axis, that of examples, over the devices."""
        return NamedSharding(self.mesh, P(self.batch_axes))

    def of_state(self, state: TrainState) -> TrainState:
        """The sharding of each leaf of a training state: arrays or shapes."""
        return by_role(state, lambda _: self.split, lambda leaf: sharding_of(leaf, self.mesh))

    def make(self, make_state: Callable[[], TrainState]) -> TrainState:
        """The state that `make_state` returns, laid over the devices."""
        shardings = self.of_state(jax.eval_shape(make_state))
        if self.mesh.shape[FSDP] == 1 and jax.process_count() == 1:
            return jax.device_put(make_state(), shardings)
        # Compiled takes longer, but no device has to hold or to reach all of it.
        return jax.jit(make_state, out_shardings=shardings)()

    def put(self, split: Split) -> Split:
        """All of a split, NumPy arrays, on every device."""

        # Not device_put, which would send it to all processes to see that it is the same.
        def put(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, self.whole, lambda _: x)

        return jax.tree.map(put, split)

    def rows_here(self, size: int) -> np.ndarray:
        """The rows of a batch of `size` that this process's devices hold."""
        slices = self.split.addressable_devices_indices_map((size,)).values()
        return np.unique(np.concatenate([np.arange(size)[index] for index in slices if index]))

    def batch(self, rows: Any, size: int) -> Any:
        """A batch from its :meth:`rows_here`, a tree of NumPy arrays."""
        here = self.rows_here(size)

        def array(rows: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                return rows[np.searchsorted(here, np.arange(size)[index[0]])]

            return jax.make_array_from_callback((size, *rows.shape[1:]), self.split, part)

        return jax.tree.map(array, rows)

    def constrained(self, batch: Any) -> Any:
        """Inside jit: lays a batch over the devices."""
        return jax.lax.with_sharding_constraint(batch, self.split)

    def jit(self, launch: Callable, state: TrainState) -> Any:
        """`jax.jit` of `launch(state, ...)`, which returns the next state and losses."""
        shardings = self.of_state(state), self.whole
        return jax.jit(launch, donate_argnums=0, out_shardings=shardings)

    def context(self) -> contextlib.AbstractContextManager:
        """In which a launch is traced: parallel gradients ask for their axis by name."""
        if self.mesh.shape[GRADIENTS] > 1:
            return jax.set_mesh(self.mesh)
        return contextlib.nullcontext()


def by_role(state: Any, of_batches: Callable[[Any], Any], of_others: Callable[[Any], Any]) -> Any:
    """Maps the leaves of a state: a previous batch's, which lie as batches do, and all others."""

    def mapped(path: Any, leaf: Any) -> Any:
        is_of_batch = any(getattr(part, "name", None) == "sampa_batch" for part in path)
        return of_batches(leaf) if is_of_batch else of_others(leaf)

    return jax.tree_util.tree_map_with_path(mapped, state)


def sharding_of(leaf: Any, mesh: Mesh) -> NamedSharding:
    """Matrices along their longest axis that `fsdp` splits evenly, everything else whole."""
    parts = mesh.shape[FSDP]
    axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
    if parts == 1 or leaf.ndim < 2 or not axes:
        return NamedSharding(mesh, P())
    longest = max(axes, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, P(*[None] * longest, FSDP))


def layout_of(config: Config) -> Layout:
    """The layout of a resolved configuration.

    Raises:
        ArgumentError: if the devices are not there, or batch or groups cannot be split over them.
    """
    devices = _devices(config.devices)
    count = len(devices)
    if count % config.fsdp:
        raise ArgumentError(
            f"--fsdp must divide the number of devices, got {config.fsdp} and {count}"
        )
    if config.fsdp > 1 and config.parallelism != "jit":
        raise ArgumentError(f"--fsdp needs --parallelism jit, got {config.parallelism}")
    if config.parallelism == "pmap" and jax.process_count() > 1:
        raise ArgumentError(
            "--parallelism pmap is for the devices of one process: use jit or shard_map"
        )
    parts = count // config.fsdp
    halves = 2 if _over_halves(config) and parts % 2 == 0 else 1
    shape = (halves, parts // halves, config.fsdp)
    axis_types = (AxisType.Auto,) * 3
    mesh = jax.make_mesh(shape, (GRADIENTS, DATA, FSDP), axis_types, devices=devices)
    activations_move = ARCHITECTURES[config.model or ""].weighs_more_than_batches
    layout = Layout(mesh, (DATA,) if activations_move else (DATA, FSDP))
    _check_batch(config, layout.parts)
    return layout


def gradient_axis(config: Config, layout: Layout) -> str | None:
    """The axis over which a method's two parallel gradients lie, if they do."""
    return GRADIENTS if _over_halves(config) and layout.mesh.shape[GRADIENTS] == 2 else None


def _over_halves(config: Config) -> bool:
    return METHODS[config.method].parallel_gradients and config.parallelism == "jit"


def _devices(count: int | None) -> list[Any]:
    """`count` devices of each process, or all."""
    there = jax.local_device_count()
    if count is not None and count > there:
        raise ArgumentError(f"--devices must be at most the {there} there are, got {count}")
    by_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    return [device for devices in by_process.values() for device in devices[:count]]


def _check_batch(config: Config, parts: int) -> None:
    size = config.batch_size or 0
    per_device = config.batch_statistics == "per-device"
    if per_device and config.group_size is not None:
        raise ArgumentError("--batch-statistics per-device has no meaning with --group-size")
    if per_device and (config.microbatch_size or size) < 2 * parts:
        raise ArgumentError(
            f"--batch-statistics per-device needs 2 examples on each of {parts} devices at a time"
        )
    if size % parts:
        raise ArgumentError(
            f"--batch-size must be a multiple of {parts}, the number of devices that share it, "
            f"got {size}: use {max(size // parts, 1) * parts}, or fewer --devices"
        )
    if config.parallelism == "jit":
        if per_device and parts > 1:
            raise ArgumentError(
                "--batch-statistics per-device needs --parallelism shard_map or pmap"
            )
        return
    # Each device works on examples of its own.
    own, group, microbatch = size // parts, config.group_size, config.microbatch_size
    _check_single_examples(config, parts)
    if group is not None and own % group:
        raise ArgumentError(
            f"--group-size must divide the {own} examples of each of {parts} devices with "
            f"--parallelism {config.parallelism}, got {group}: use --parallelism jit"
        )
    if microbatch is not None and microbatch % (parts * (group or 1)):
        raise ArgumentError(
            f"--microbatch-size must be a multiple of {parts * (group or 1)}, for {parts} devices "
            f"with --parallelism {config.parallelism}, got {microbatch}"
        )


def _check_single_examples(config: Config, parts: int) -> None:
    """Refuses one example on each device, which cannot be told from a single one of the batch."""
    shared = config.batch_statistics == "synchronised" and config.group_size is None
    if parts == 1 or not (shared and METHODS[config.method].takes_single_examples):
        return
    size = config.batch_size or 0
    if parts in (config.microbatch_size or size, *config.examples_left(size).values()):
        raise ArgumentError(
            f"--method {config.method} needs 2 examples on each of {parts} devices at a time with "
            f"--parallelism {config.parallelism}: use --parallelism jit, or fewer --devices"
        )
