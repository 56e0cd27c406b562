"""What one training step asks of each of 1 to 64 devices: FLOPs, communication, memory.

The step is compiled for simulated CPU devices, and never run. Every device has the same number of
examples (weak scaling), so a number that grows along a row of the table is a cost of the devices.

FLOPs and memory are XLA's own figures of one device's program. The bytes that a device sends are
those of the collectives there, over rings: with g devices and b bytes of result on each of them,

    all-reduce          2 (g - 1) / g * b
    all-gather          (g - 1) / g * b
    reduce-scatter      (g - 1) * b
    all-to-all          (g - 1) / g * b
    collective-permute  b

A collective in the body of a loop counts once. XLA for GPUs and TPUs splits a program over devices
in the same way, but then joins, splits and overlaps collectives by rules of its own, and makes
reduce-scatters of all-reduces whose result is not needed whole.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bisam_jax
from experiments import data, models
from experiments.layout import by_role, sharding_of

DEVICES = (1, 2, 4, 8, 16, 32, 64)


class Collective(NamedTuple):
    """An instruction by which `group` devices exchange data; `size` bytes result on each."""

    kind: str
    size: int
    group: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends; see the module's docstring."""
        share = (self.group - 1) / self.group
        factors = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1}
        factors |= {"all-gather": share, "all-to-all": share, "collective-permute": 1}
        return factors[self.kind] * self.size


_COLLECTIVE = re.compile(
    r" = ([^=\n]+?) (all-(?:reduce|gather|to-all)|reduce-scatter|collective-permute)(-start)?\((.*)"
)


def collectives(hlo: str, devices: int) -> list[Collective]:
    """The collectives among more than one device in the text of a program for `devices`."""
    found = []
    for match in _COLLECTIVE.finditer(re.sub(r"/\*.*?\*/", "", hlo)):
        shape, kind, start, rest = match.groups()
        if start and kind != "all-reduce":  # Operands come first in the result.
            without_layouts = re.sub(r"\{.*?\}", "", shape)
            shape = re.findall(r"\([^()]*\)|\w+\[[\d,]*\]", without_layouts[1:])[1]
        found.append(Collective(kind, _bytes(shape), _group_size(rest, devices)))
    return [collective for collective in found if collective.group > 1]


def _bytes(shape: str) -> int:
    """Of an HLO shape, that of a tuple too."""
    total = 0
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        width = re.search(r"\d+", dtype)
        bits = int(width[0]) if width else {"pred": 8}.get(dtype, 0)
        total += bits * math.prod(int(size) for size in sizes.split(",") if size) // 8
    return total


def _group_size(attributes: str, devices: int) -> int:
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"(\w+)'?=(\d+)", mesh[1]))
        axes = re.findall(r"([a-zA-Z_]\w*)'?(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(listed[1].split(",")) if listed else devices


class Problem(NamedTuple):
    """Parameters, the examples of one device, and losses of both; shapes are enough."""

    params: Any
    batch: Any
    loss_fn: Callable
    perturbation_loss_fn: Callable


class Layout(NamedTuple):
    """All devices lie along `axis`, or in two `halves`, and examples over the axes in `batch`."""

    axis: str = "data"
    batch: tuple[str, ...] = ("data",)
    halves: bool = False

    def mesh(self, devices: int) -> Mesh:
        """Of the first so many devices."""
        sizes = {"gradients": 1, "data": 1, "fsdp": 1, self.axis: devices}
        if self.halves:
            sizes |= {"gradients": 2, "data": devices // 2}
        auto, first = (AxisType.Auto,) * 3, jax.devices()[:devices]
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), auto, devices=first)


REPLICATED = Layout()
SHARDED = Layout(axis="fsdp")
SHARDED_WITH_BATCH = Layout(axis="fsdp", batch=("data", "fsdp"))


class Method(NamedTuple):
    """A step `(params, state, batch)` to the next parameters and state, and where it lies.

    The state before the first step is `init(params, batch)`.
    """

    step: Callable
    init: Callable
    layout: Layout = REPLICATED


def methods(problem: Problem, rho: float) -> dict[str, Method]:
    """The rows of the table, each with the same base optimizer."""
    base = optax.sgd(0.1, momentum=0.9)
    examples = len(jax.tree.leaves(problem.batch)[0])

    def gradient(tx: Any, q: Callable | None = None, **options: Any) -> Callable:
        step = bisam_jax.value_and_grad(tx, problem.loss_fn, q, **options)
        return lambda params, batch: step(params, tx.init(params), batch)[1]

    def mapped(gradient_fn: Callable) -> Callable:
        # Made for each mesh in context anew: it keeps the first.
        return lambda params, batch: jax.shard_map(
            gradient_fn, in_specs=(P(), P("data")), out_specs=P()
        )(params, batch)

    def descent(gradient_fn: Callable, layout: Layout = REPLICATED) -> Method:
        def step(params: Any, state: Any, batch: Any) -> tuple:
            updates, state = base.update(gradient_fn(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        return Method(step, lambda params, batch: base.init(params), layout)

    def sampa(layout: Layout, gradient_axis: str | None = None) -> Method:
        make = functools.partial(bisam_jax.sampa, base, rho, gradient_axis=gradient_axis)

        def step(params: Any, state: Any, batch: Any) -> tuple:
            value_and_grad = bisam_jax.value_and_grad(make(batch_like=batch), problem.loss_fn)
            _, updates, state = value_and_grad(params, state, batch)
            return optax.apply_updates(params, updates), state

        return Method(step, lambda params, batch: make(batch_like=batch).init(params), layout)

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
        "SAMPa, two halves": sampa(Layout(halves=True), gradient_axis="gradients"),
        "SGD, sharded parameters": descent(sgd, SHARDED),
        "BiSAM, sharded parameters": descent(bisam, SHARDED),
        "SGD, sharded parameters, batch": descent(sgd, SHARDED_WITH_BATCH),
        "BiSAM, sharded parameters, batch": descent(bisam, SHARDED_WITH_BATCH),
    }


def measure(
    problem: Problem, rho: float, devices: Sequence[int], names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A row for each of the methods, or for those in `names`, on each number of devices."""
    return [
        {"method": name, "devices": n} | _measure(method, problem, n)
        for name, method in methods(problem, rho).items()
        for n in devices
        if (not names or name in names) and not (method.layout.halves and n % 2)
    ]


def _measure(method: Method, problem: Problem, devices: int) -> dict[str, float]:
    mesh = method.layout.mesh(devices)
    split = NamedSharding(mesh, P(method.layout.batch))
    batch = jax.tree.map(
        lambda x: x.update(shape=(devices * x.shape[0], *x.shape[1:]), sharding=split),
        problem.batch,
    )
    state = jax.eval_shape(lambda p, b: (p, method.init(p, b)), problem.params, batch)
    shardings = by_role(state, lambda _: split, lambda x: sharding_of(x, mesh))
    state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, shardings)
    step = jax.jit(method.step, donate_argnums=(0, 1), out_shardings=shardings)
    # Counts and sizes are the same with less effort on machine code that is never run.
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


def problem_of(
    network: str, options: dict[str, Any], image_shape: Sequence[int], classes: int, examples: int
) -> Problem:
    """Training a network on `examples` images a device."""
    apply, params, stats = models.create(network, tuple(image_shape), classes, seed=0, **options)

    def mean_of(per_example: Callable) -> Callable:
        def fn(params: Any, batch: data.Split) -> jax.Array:
            logits, _ = apply(params, stats, batch.images, train=True)
            return per_example(logits, batch.labels).mean()

        return fn

    images = jax.ShapeDtypeStruct((examples, *image_shape), jnp.float32)
    batch = data.Split(images, jax.ShapeDtypeStruct((examples,), jnp.int32))
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return Problem(params, batch, mean_of(cross_entropy), mean_of(bisam_jax.perturbation_loss))


def run(
    problem: dict[str, Any], rho: float, devices: Sequence[int] = DEVICES, **options: Any
) -> list[dict[str, Any]]:
    """:func:`measure` in a process of its own: the number of devices is fixed when JAX starts."""
    asked = {"problem": problem, "rho": rho, "devices": devices, **options}
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={max(devices)}"
    report = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark_scaling"],
        input=json.dumps(asked),
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(report.stdout)


QUANTITIES: dict[str, Callable[[dict[str, Any], dict[str, Any]], str]] = {
    "FLOPs, SGD on one = 1": lambda row, first: f"{row['flops'] / first['flops']:.2f}",
    "MB sent": lambda row, first: f"{row['sent_bytes'] / 1e6:.2f}",
    "collectives": lambda row, first: str(row["collectives"]),
    "MB of arguments": lambda row, first: f"{row['argument_bytes'] / 1e6:.2f}",
    "MB of temporary memory": lambda row, first: f"{row['temporary_bytes'] / 1e6:.2f}",
}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text: for each quantity, a line per method and a column per number of devices."""
    devices = dict.fromkeys(row["devices"] for row in rows)
    parts = []
    for title, text in QUANTITIES.items():
        lines = [f"{title:34}" + "".join(f"{n:>8}" for n in devices)]
        for method in dict.fromkeys(row["method"] for row in rows):
            cells = {row["devices"]: text(row, rows[0]) for row in rows if row["method"] == method}
            lines.append(f"{method:34}" + "".join(f"{cells.get(n, '-'):>8}" for n in devices))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    """Reads what to measure, writes the rows."""
    asked = json.load(sys.stdin)
    json.dump(measure(**asked | {"problem": problem_of(**asked["problem"])}), sys.stdout)


if __name__ == "__main__":
    main()
