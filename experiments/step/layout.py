"""The layout of a run over devices.

The devices form a mesh of three axes:

gradients   two parallel gradients of a method, each on one half of the devices; otherwise size 1
data        parts of the batch
fsdp        parts of the parameters, and of every array that has their shapes

A batch lies over `data`. It lies over `fsdp` too if its activations outweigh the parameters: XLA
then gathers the parameters on every device when it needs them. Otherwise the parameters stay where
they are, and activations move.
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

from experiments.config.config import Place
from experiments.config.recipe import Recipe
from experiments.data import Split
from experiments.models import architecture
from experiments.step.train_step import TrainState
from experiments.system.command_line import ArgumentError

GRADIENTS, DATA, FSDP = "gradients", "data", "fsdp"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and what lies where on it. :func:`layout_of` makes one.

    Attributes:
        mesh: the devices, with the axes `gradients`, `data` and `fsdp`.
        batch_axes: the axes over which batches lie.
        parallelism: "jit" for one program over all devices; "shard_map" or "pmap" for one on each.
    """

    mesh: Mesh
    batch_axes: tuple[str, ...] = (DATA,)
    parallelism: str = "jit"

    @property
    def axis_name(self) -> str | None:
        """The axis name in the program of one device; None under jit."""
        return None if self.parallelism == "jit" else DATA

    @property
    def parts_of_program(self) -> int:
        """The number of programs that share a batch: one with jit, else one per device."""
        return 1 if self.parallelism == "jit" else self.parts

    @property
    def gradient_axis(self) -> str | None:
        """The axis over which two parallel gradients lie; None without them."""
        return GRADIENTS if self.mesh.shape[GRADIENTS] == 2 else None

    @property
    def parts(self) -> int:
        """The number of parts of a batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    @property
    def whole(self) -> NamedSharding:
        """The sharding of an array that is whole on every device."""
        return NamedSharding(self.mesh, P())

    @property
    def split(self) -> NamedSharding:
        """The sharding of an array whose first axis, the examples, lies over the devices."""
        return NamedSharding(self.mesh, P(self.batch_axes))

    def of_state(self, state: TrainState) -> TrainState:
        """Returns the sharding of each leaf of a training state of arrays or shapes."""
        return by_role(state, lambda _: self.split, lambda leaf: sharding_of(leaf, self.mesh))

    def make(self, make_state: Callable[[], TrainState]) -> TrainState:
        """Returns the state of `make_state`, laid over the devices."""
        shardings = self.of_state(jax.eval_shape(make_state))
        if self.mesh.shape[FSDP] == 1 and jax.process_count() == 1:
            return jax.device_put(make_state(), shardings)
        # Compiling takes longer, but no device needs the whole state.
        return jax.jit(make_state, out_shardings=shardings)()

    def put(self, split: Split) -> Split:
        """Returns a split of NumPy arrays, whole on every device."""

        # device_put would send the array to all processes to compare it.
        def put(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, self.whole, lambda _: x)

        return jax.tree.map(put, split)

    def rows_here(self, size: int) -> np.ndarray:
        """Returns the rows of a batch of `size` that the devices of this process hold."""
        slices = self.split.addressable_devices_indices_map((size,)).values()
        return np.unique(np.concatenate([np.arange(size)[index] for index in slices if index]))

    def batch(self, rows: Any, size: int) -> Any:
        """Returns a batch on the devices, from its :meth:`rows_here` as NumPy arrays."""
        here = self.rows_here(size)

        def array(rows: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                return rows[np.searchsorted(here, np.arange(size)[index[0]])]

            return jax.make_array_from_callback((size, *rows.shape[1:]), self.split, part)

        return jax.tree.map(array, rows)

    def constrained(self, batch: Any) -> Any:
        """Lays a batch over the devices, inside jit."""
        return jax.lax.with_sharding_constraint(batch, self.split)

    def jit(self, launch: Callable, state: TrainState) -> Any:
        """Jits `launch(state, ...)`, which returns the next state and losses."""
        shardings = self.of_state(state), self.whole
        return jax.jit(launch, donate_argnums=0, out_shardings=shardings)

    def context(self) -> contextlib.AbstractContextManager:
        """Returns the context to trace in: parallel gradients name their mesh axis."""
        if self.mesh.shape[GRADIENTS] > 1:
            return jax.set_mesh(self.mesh)
        return contextlib.nullcontext()


def by_role(state: Any, of_batches: Callable[[Any], Any], of_others: Callable[[Any], Any]) -> Any:
    """Maps the leaves of a state: `of_batches` those of a kept batch, `of_others` the rest."""

    def mapped(path: Any, leaf: Any) -> Any:
        is_of_batch = any(getattr(part, "name", None) == "sampa_batch" for part in path)
        return of_batches(leaf) if is_of_batch else of_others(leaf)

    return jax.tree_util.tree_map_with_path(mapped, state)


def sharding_of(leaf: Any, mesh: Mesh) -> NamedSharding:
    """Returns a leaf's sharding. Matrices split along their longest axis that `fsdp` divides."""
    parts = mesh.shape[FSDP]
    axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
    if parts == 1 or leaf.ndim < 2 or not axes:
        return NamedSharding(mesh, P())
    longest = max(axes, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, P(*[None] * longest, FSDP))


def layout_of(recipe: Recipe, place: Place) -> Layout:
    """Returns the layout of a run.

    Raises:
        ArgumentError: if there are too few devices, or they cannot share the batch or the groups.
    """
    devices = _devices(place.devices)
    count = len(devices)
    if count % place.fsdp:
        raise ArgumentError(
            f"--fsdp must divide the number of devices, got {place.fsdp} and {count}"
        )
    if place.fsdp > 1 and place.parallelism != "jit":
        raise ArgumentError(f"--fsdp needs --parallelism jit, got {place.parallelism}")
    if place.parallelism == "pmap" and jax.process_count() > 1:
        raise ArgumentError(
            "--parallelism pmap is for the devices of one process: use jit or shard_map"
        )
    parts = count // place.fsdp
    over_halves = recipe.method_spec.parallel_gradients and place.parallelism == "jit"
    halves = 2 if over_halves and parts % 2 == 0 else 1
    shape = (halves, parts // halves, place.fsdp)
    axis_types = (AxisType.Auto,) * 3
    mesh = jax.make_mesh(shape, (GRADIENTS, DATA, FSDP), axis_types, devices=devices)
    activations_move = architecture(recipe.model).weighs_more_than_batches
    layout = Layout(mesh, (DATA,) if activations_move else (DATA, FSDP), place.parallelism)
    _check_statistics(recipe, layout)
    _check_batch(recipe, layout)
    if _groups_fit_devices(recipe, place, layout.parts):
        return dataclasses.replace(layout, parallelism="shard_map")
    return layout


def _groups_fit_devices(recipe: Recipe, place: Place, parts: int) -> bool:
    """Returns whether every device can have whole groups.

    Each device then computes its own groups, since XLA cannot split the convolutions of many
    models over devices.
    """
    if place.parallelism != "jit" or not recipe.in_groups or place.fsdp > 1:
        return False
    return parts > 1 and recipe.microbatch_size % (parts * recipe.group_size) == 0


def _devices(count: int | None) -> list[Any]:
    """Returns the first `count` devices of each process, or all."""
    there = jax.local_device_count()
    if count is not None and count > there:
        raise ArgumentError(f"--devices must be at most the {there} there are, got {count}")
    by_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    return [device for devices in by_process.values() for device in devices[:count]]


def _check_statistics(recipe: Recipe, layout: Layout) -> None:
    """Refuses batch statistics per device where they cannot be computed."""
    if recipe.batch_statistics != "per-device":
        return
    if recipe.in_groups:
        raise ArgumentError("--batch-statistics per-device has no meaning with --group-size")
    if recipe.microbatch_size < 2 * layout.parts:
        raise ArgumentError(
            f"--batch-statistics per-device needs 2 examples on each of {layout.parts} devices "
            "at a time"
        )
    if layout.parallelism == "jit" and layout.parts > 1:
        raise ArgumentError("--batch-statistics per-device needs --parallelism shard_map or pmap")


def _check_batch(recipe: Recipe, layout: Layout) -> None:
    """Refuses sizes that cannot be split over the devices."""
    size, parts = recipe.batch_size, layout.parts
    if size % parts:
        raise ArgumentError(
            f"--batch-size must be a multiple of {parts}, the number of devices that share it, "
            f"got {size}: use {max(size // parts, 1) * parts}, or fewer --devices"
        )
    if layout.parallelism == "jit":
        return
    _check_single_examples(recipe, layout)
    own = size // parts
    if recipe.in_groups and own % recipe.group_size:
        raise ArgumentError(
            f"--group-size must divide the {own} examples of each of {parts} devices with "
            f"--parallelism {layout.parallelism}, got {recipe.group_size}: use --parallelism jit"
        )
    unit = parts * (recipe.group_size if recipe.in_groups else 1)
    if recipe.microbatch_size % unit:
        raise ArgumentError(
            f"--microbatch-size must be a multiple of {unit}, for {parts} devices with "
            f"--parallelism {layout.parallelism}, got {recipe.microbatch_size}"
        )


def _check_single_examples(recipe: Recipe, layout: Layout) -> None:
    """Refuses one example per device: the step would take it for the gradient of one example."""
    shared = recipe.batch_statistics == "synchronised" and not recipe.in_groups
    parts = layout.parts
    if parts == 1 or not (shared and recipe.method_spec.takes_single_examples):
        return
    left = recipe.examples_left(recipe.batch_size).values()
    if parts in (recipe.microbatch_size, *left):
        raise ArgumentError(
            f"--method {recipe.method} needs 2 examples on each of {parts} devices at a time with "
            f"--parallelism {layout.parallelism}: use --parallelism jit, or fewer --devices"
        )
