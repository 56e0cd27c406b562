"""Counts FLOPs, communication and memory of one training step on each of 1 to 64 devices.

    python -m experiments.benchmarks.scaling --network mlp --batch-size 64

The step is compiled for simulated CPU devices and never run. Every device has the same number of
examples (weak scaling), so a number that grows along a row of the table is the cost of more
devices. The result is in docs/scaling.md.

FLOPs and memory are XLA's numbers for the program of one device. The sent bytes are those of its
collectives. A collective in the body of a loop counts once. XLA for GPUs and TPUs splits a program
over devices in the same way. It then joins, splits and overlaps collectives by its own rules, and
turns an all-reduce into a reduce-scatter if no device needs the whole result.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bisam_jax
from experiments import data, models
from experiments.benchmarks.collectives import collectives
from experiments.benchmarks.problems import (
    CLASSES,
    IMAGE_SHAPE,
    NETWORKS,
    compilers_convolutions,
    losses_of,
)
from experiments.config.config import check_ranges
from experiments.config.hyperparameters import Range
from experiments.step.layout import by_role, sharding_of
from experiments.system import command_line, exhaustion

DEVICES = (1, 2, 4, 8, 16, 32, 64)


class Problem(NamedTuple):
    """Parameters, the examples of one device, and two losses. Arrays may be shapes."""

    params: Any
    batch: Any
    loss_fn: Callable
    perturbation_loss_fn: Callable


class Placement(NamedTuple):
    """Devices along `axis`, or in two `halves`, and examples over the axes in `batch`."""

    axis: str = "data"
    batch: tuple[str, ...] = ("data",)
    halves: bool = False

    def mesh(self, devices: int) -> Mesh:
        """Returns a mesh of the first `devices` devices."""
        sizes = {"gradients": 1, "data": 1, "fsdp": 1, self.axis: devices}
        if self.halves:
            sizes |= {"gradients": 2, "data": devices // 2}
        auto, first = (AxisType.Auto,) * 3, jax.devices()[:devices]
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), auto, devices=first)


REPLICATED = Placement()
SHARDED = Placement(axis="fsdp")
SHARDED_WITH_BATCH = Placement(axis="fsdp", batch=("data", "fsdp"))


class Case(NamedTuple):
    """A method to count: its step, its first state and its placement.

    Attributes:
        step: maps `(params, state, batch)` to the next parameters and state.
        init: maps `(params, batch)` to the state before the first step.
        placement: the mesh, and the axes of the batch.
    """

    step: Callable
    init: Callable
    placement: Placement = REPLICATED


def cases(problem: Problem, rho: float) -> dict[str, Case]:
    """Returns the cases by the names of their rows, all with the same base optimizer."""
    base = optax.sgd(0.1, momentum=0.9)
    examples = len(jax.tree.leaves(problem.batch)[0])

    def gradient(tx: Any, q: Callable | None = None, **options: Any) -> Callable:
        step = bisam_jax.value_and_grad(tx, problem.loss_fn, q, **options)
        return lambda params, batch: step(params, tx.init(params), batch)[1]

    def mapped(gradient_fn: Callable) -> Callable:
        # Mapped at each call, since a mapped function keeps the first mesh in context.
        return lambda params, batch: jax.shard_map(
            gradient_fn, in_specs=(P(), P("data")), out_specs=P()
        )(params, batch)

    def descent(gradient_fn: Callable, placement: Placement = REPLICATED) -> Case:
        def step(params: Any, state: Any, batch: Any) -> tuple:
            updates, state = base.update(gradient_fn(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        return Case(step, lambda params, batch: base.init(params), placement)

    def sampa(placement: Placement, gradient_axis: str | None = None) -> Case:
        make = functools.partial(bisam_jax.sampa, base, rho, gradient_axis=gradient_axis)

        def step(params: Any, state: Any, batch: Any) -> tuple:
            value_and_grad = bisam_jax.value_and_grad(make(batch_like=batch), problem.loss_fn)
            _, updates, state = value_and_grad(params, state, batch)
            return optax.apply_updates(params, updates), state

        return Case(step, lambda params, batch: make(batch_like=batch).init(params), placement)

    q = problem.perturbation_loss_fn
    sgd, bisam = gradient(optax.identity()), gradient(bisam_jax.bisam(rho), q)
    in_groups = functools.partial(gradient, bisam_jax.bisam(rho), q, group_size=examples)
    return {
        "SGD": descent(sgd),
        "SAM": descent(gradient(bisam_jax.sam(rho))),
        "BiSAM": descent(bisam),
        "BiSAM, groups": descent(in_groups()),
        "BiSAM, groups, shard_map": descent(mapped(in_groups(axis_name="data"))),
        "SAMPa": sampa(REPLICATED),
        "SAMPa, two halves": sampa(Placement(halves=True), gradient_axis="gradients"),
        "SGD, sharded parameters": descent(sgd, SHARDED),
        "BiSAM, sharded parameters": descent(bisam, SHARDED),
        "SGD, sharded parameters, batch": descent(sgd, SHARDED_WITH_BATCH),
        "BiSAM, sharded parameters, batch": descent(bisam, SHARDED_WITH_BATCH),
    }


def count(
    problem: Problem, rho: float, devices: Sequence[int], names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Returns a row per method and number of devices, for the methods in `names` or for all."""
    return [
        {"method": name, "devices": n} | _measure(case, problem, n)
        for name, case in cases(problem, rho).items()
        for n in devices
        if (not names or name in names) and not (case.placement.halves and n % 2)
    ]


def _measure(case: Case, problem: Problem, devices: int) -> dict[str, float]:
    mesh = case.placement.mesh(devices)
    split = NamedSharding(mesh, P(case.placement.batch))
    batch = jax.tree.map(
        lambda x: x.update(shape=(devices * x.shape[0], *x.shape[1:]), sharding=split),
        problem.batch,
    )
    state = jax.eval_shape(lambda p, b: (p, case.init(p, b)), problem.params, batch)
    shardings = by_role(state, lambda _: split, lambda x: sharding_of(x, mesh))
    state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, shardings)
    step = jax.jit(case.step, donate_argnums=(0, 1), out_shardings=shardings)
    # Counts and sizes do not need optimized machine code.
    options: Any = {"xla_backend_optimization_level": 0}
    with jax.set_mesh(mesh):
        program: Any = step.lower(*state, batch).compile(options)
    found = collectives(program.as_text(), devices)
    return {
        "flops": program.cost_analysis()["flops"],
        "collectives": len(found),
        "sent_bytes": sum(collective.sent for collective in found),
        "argument_bytes": program.memory_analysis().argument_size_in_bytes,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def problem_of(network: str, examples: int) -> Problem:
    """Returns the problem of a network and `examples` images per device."""
    # Only CPUs would compute convolutions as products in a loop.
    with compilers_convolutions():
        apply, params, stats = models.create(
            network, IMAGE_SHAPE, CLASSES, seed=0, **NETWORKS[network][1]
        )
    images = jax.ShapeDtypeStruct((examples, *IMAGE_SHAPE), jnp.float32)
    batch = data.Split(images, jax.ShapeDtypeStruct((examples,), jnp.int32))
    return Problem(params, batch, *losses_of(apply, stats))


QUANTITIES: dict[str, Callable[[dict[str, Any], dict[str, Any]], str]] = {
    "FLOPs, SGD on one = 1": lambda row, first: f"{row['flops'] / first['flops']:.2f}",
    "MB sent": lambda row, first: f"{row['sent_bytes'] / 1e6:.2f}",
    "collectives": lambda row, first: str(row["collectives"]),
    "MB of arguments": lambda row, first: f"{row['argument_bytes'] / 1e6:.2f}",
    "MB of temporary memory": lambda row, first: f"{row['temporary_bytes'] / 1e6:.2f}",
}


def scaling_as_text(rows: list[dict[str, Any]]) -> str:
    """Returns a table per quantity: a line per method, and a column per number of devices."""
    devices = dict.fromkeys(row["devices"] for row in rows)
    parts = []
    for title, text in QUANTITIES.items():
        lines = [f"{title:34}" + "".join(f"{n:>8}" for n in devices)]
        for method in dict.fromkeys(row["method"] for row in rows):
            cells = {row["devices"]: text(row, rows[0]) for row in rows if row["method"] == method}
            lines.append(f"{method:34}" + "".join(f"{cells.get(n, '-'):>8}" for n in devices))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


@dataclasses.dataclass(frozen=True)
class ScalingOptions:
    """The command line: what to count."""

    network: Literal["mlp", "cnn", "resnet20"] = "mlp"
    """A perceptron 784-512-512-10, a small convolutional network, or ResNet-20."""
    batch_size: int = 64
    """Examples per device and step."""
    rho: float = 0.05
    """Radius of the perturbation."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        check_ranges(self, {"batch_size": Range(2), "rho": Range(0)})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    options = command_line.parse(ScalingOptions, __doc__ or "", args)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    rows = count(problem_of(options.network, options.batch_size), options.rho, DEVICES)
    layers = NETWORKS[options.network][0]
    print(f"{options.network} {layers}, {options.batch_size} examples per device\n")
    print(scaling_as_text(rows))


if __name__ == "__main__":
    exhaustion.run(main)
