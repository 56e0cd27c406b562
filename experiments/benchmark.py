"""Times one training step of each method, and reads its FLOPs and memory from the compiled program.

    python -m experiments.benchmark --output benchmark.json

The methods take turns, step by step, so that a change in the machine's speed meets all of them. Two
of them are `optax.contrib.sam` with `opaque_mode=True`, and with `opaque_mode=False`, whose step
is two calls: one for each gradient. A second table has every method of the training script; where
a step's work changes (sparse-fisher makes a mask now and then), FLOPs are the dearest step's.
XLA counts the body of a loop once: of tilted's three samples, run in a loop, two are counted.

    python -m experiments.benchmark --loop

compares the training loop with the bare step instead, and

    python -m experiments.benchmark --scaling --network mlp --batch-size 64

counts what a step asks of each of 1 to 64 devices; docs/scaling.md has the result.
"""

import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bisam_jax
from experiments import (
    benchmark_loop,
    benchmark_scaling,
    command_line,
    data,
    methods,
    models,
    training,
)

NETWORKS = {
    "mlp": ("784-512-512-10", {"width": 512}),
    "cnn": ("32-64-128", {}),
    "resnet20": ("16-32-64", {}),
}
IMAGE_SHAPE = (28, 28, 1)
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    steps: int = 100
    """Counted steps of each method."""
    batch_size: int = 128
    """Examples a step; with --scaling, of each device."""
    rho: float = 0.05
    """Radius of the perturbation."""
    network: Literal["mlp", "cnn", "resnet20", "both"] = "both"
    """A perceptron 784-512-512-10, a small convolutional network, ResNet-20, or the first two."""
    family: bool = True
    """Whether to measure every method of the training script too."""
    loop: bool = False
    """Measure what the training loop adds to a step instead; --steps counts rounds of 20 steps."""
    scaling: bool = False
    """Count what a step asks of each of 1 to 64 simulated devices instead; nothing is timed."""
    output: Path = Path("benchmark.json")
    """Where the numbers go."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name, value in (("--steps", self.steps), ("--batch-size", self.batch_size)):
            if value < 2:
                raise ValueError(f"{name} must be at least 2, got {value}")
        if self.loop and self.scaling:
            raise ValueError("--loop and --scaling exclude each other")
        if not 0 <= self.rho < math.inf:
            raise ValueError(f"--rho must be finite, at least 0, got {self.rho}")
        if self.output.is_dir() or not self.output.parent.is_dir():
            raise ValueError(f"--output must be a file in an existing folder, got {self.output}")


class Subject(NamedTuple):
    """Something to time: `calls` times a step, `update` from and to parameters and state."""

    name: str
    update: Callable
    init: Callable
    calls: int = 1


def subjects(loss_fn: Callable, q: Callable, rho: float) -> list[Subject]:
    """The methods under comparison, each with the same base optimizer."""
    base = optax.sgd(0.1, momentum=0.9)
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    opaque = optax.contrib.sam(base, adversary, opaque_mode=True)
    transparent = optax.contrib.sam(base, adversary)

    def through(method: Any, perturbation_loss_fn: Callable | None = None) -> Subject:
        tx = optax.chain(method, base)
        step = bisam_jax.value_and_grad(tx, loss_fn, perturbation_loss_fn)

        def update(params: Any, state: Any, batch: Any) -> tuple:
            _, updates, state = step(params, state, batch)
            return optax.apply_updates(params, updates), state

        return Subject("", update, lambda params, batch: tx.init(params))

    def opaque_update(params: Any, state: Any, batch: Any) -> tuple:
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = opaque.update(
            grads, state, params, grad_fn=lambda point, _: jax.grad(loss_fn)(point, batch)
        )
        return optax.apply_updates(params, updates), state

    def transparent_update(params: Any, state: Any, batch: Any) -> tuple:
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = transparent.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return [
        through(optax.identity())._replace(name="sgd"),
        through(bisam_jax.sam(rho))._replace(name="sam"),
        through(bisam_jax.bisam(rho), q)._replace(name="bisam-log"),
        Subject(
            "optax.contrib.sam, opaque", opaque_update, lambda params, batch: opaque.init(params)
        ),
        Subject(
            "optax.contrib.sam, transparent",
            transparent_update,
            lambda params, batch: transparent.init(params),
            calls=2,
        ),
    ]


def family(apply: Callable, params: Any, stats: Any, rho: float) -> list[Subject]:
    """Every method of the training script, ascending cross-entropy and BiSAM's loss (-log)."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels

    def as_batch(batch: data.Split) -> training.Batch:
        return training.Batch(*batch, positions=jnp.arange(len(batch.labels)))

    def subject(name: str, perturbation: str) -> Subject:
        values = methods.PERTURBATIONS[perturbation] | methods.METHODS[name].defaults | {"rho": rho}

        def method(batch: data.Split) -> methods.Method:
            return methods.make(name, perturbation, optimizer, values, batch_like=as_batch(batch))

        def update(params: Any, state: Any, batch: data.Split) -> tuple:
            full = training.TrainState(params=params, stats=stats, **state)
            new, _ = training.make_step(apply, method(batch), loss)(full, as_batch(batch))
            kept = {name: getattr(new, name) for name in state}
            return new.params, kept

        def init(params: Any, batch: data.Split) -> dict[str, Any]:
            key = jax.random.key(0)
            state = training.init_state(params, stats, method(batch), key)._asdict()
            return {name: state[name] for name in state if name not in ("params", "stats")}

        return Subject(f"{name}, {perturbation}", update, init)

    # The others are named by what they ascend.
    names = [name for name, spec in methods.METHODS.items() if spec.ascends is None]
    return [subject(methods.PLAIN, "ce")] + [
        subject(name, perturbation)
        for name in names
        if name != methods.PLAIN
        for perturbation in ("ce", "log")
    ]


def measure(network: str, config: Config) -> dict[str, list[dict[str, Any]]]:
    """Two tables, beside optax and of the family, with a row per method."""
    apply, params, stats = models.create(
        network, IMAGE_SHAPE, CLASSES, seed=0, **NETWORKS[network][1]
    )
    keys = jax.random.split(jax.random.key(0))
    batch = data.Split(
        jax.random.uniform(keys[0], (config.batch_size, *IMAGE_SHAPE)),
        jax.random.randint(keys[1], (config.batch_size,), 0, CLASSES),
    )

    def mean_of(per_example: Callable) -> Callable:
        def fn(params: Any, batch: data.Split) -> jax.Array:
            logits, _ = apply(params, stats, batch.images, train=True)
            return per_example(logits, batch.labels).mean()

        return fn

    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    beside_optax = subjects(
        mean_of(cross_entropy), mean_of(bisam_jax.perturbation_loss), config.rho
    )
    tables = {"beside optax": beside_optax}
    if config.family:
        tables["family"] = family(apply, params, stats, config.rho)
    return {
        title: _measure(subjects, params, batch, config.steps) for title, subjects in tables.items()
    }


def _measure(
    subjects: list[Subject], params: Any, batch: data.Split, steps: int
) -> list[dict[str, Any]]:
    compiled = []
    for subject in subjects:
        state = subject.init(params, batch)
        program = jax.jit(subject.update).lower(params, state, batch).compile()
        compiled.append([program, params, state])
    seconds = _interleaved(compiled, batch, [s.calls for s in subjects], steps)
    return [
        _row(subject, program, state, times)
        for subject, (program, _, state), times in zip(subjects, compiled, seconds, strict=True)
    ]


def _interleaved(
    compiled: list[list], batch: data.Split, calls: list[int], steps: int
) -> list[list[float]]:
    """Seconds of each step of each program, after a tenth as many steps of warm-up."""
    seconds: list[list[float]] = [[] for _ in compiled]
    warm_up = max(3, steps // 10)
    for step in range(warm_up + steps):
        for entry, times, n_calls in zip(compiled, seconds, calls, strict=True):
            program, params, state = entry
            start = time.perf_counter()
            for _ in range(n_calls):
                params, state = program(params, state, batch)
            jax.block_until_ready((params, state))
            if step >= warm_up:
                times.append(time.perf_counter() - start)
            entry[1:] = params, state
    return seconds


def _row(subject: Subject, program: Any, state: Any, times: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(times, n=4)
    return {
        "method": subject.name,
        "milliseconds": 1e3 * statistics.median(times),
        "quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
        "flops": subject.calls * program.cost_analysis()["flops"],
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, with time and FLOPs relative to the first."""
    lines = [
        f"{'method':32}{'ms/step':>9}{'quartiles':>17}{'time':>7}{'FLOPs':>7}"
        f"{'temporary':>12}{'state':>17}"
    ]
    for row in rows:
        low, high = row["quartiles"]
        quartiles = f"{low:.2f}-{high:.2f}"
        lines.append(
            f"{row['method']:32}{row['milliseconds']:9.2f}{quartiles:>17}"
            f"{row['milliseconds'] / rows[0]['milliseconds']:6.2f}x"
            f"{row['flops'] / rows[0]['flops']:6.2f}x"
            f"{row['temporary_bytes'] / 1e6:9.2f} MB{row['state_bytes']:11,} bytes"
        )
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = command_line.parse(Config, __doc__ or "", args)
    results = {}
    for network in ["mlp", "cnn"] if config.network == "both" else [config.network]:
        if config.scaling:
            problem = {
                "network": network,
                "options": NETWORKS[network][1],
                "image_shape": IMAGE_SHAPE,
                "classes": CLASSES,
                "examples": config.batch_size,
            }
            results[network] = benchmark_scaling.run(problem, config.rho)
            heading = f"{network} {NETWORKS[network][0]}, {config.batch_size} examples a device"
            print(f"\n{heading}\n\n{benchmark_scaling.table(results[network])}", flush=True)
            continue
        if config.loop:
            results[network] = benchmark_loop.measure(network, config.batch_size, config.steps)
            print(
                f"\n{network}, batch {config.batch_size}\n{benchmark_loop.table(results[network])}"
            )
            continue
        results[network] = measure(network, config)
        for title, rows in results[network].items():
            heading = f"{network} {NETWORKS[network][0]}, batch {config.batch_size}, {title}"
            print(f"\n{heading}\n{table(rows)}", flush=True)
    report = {
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "bisam_jax": bisam_jax.__version__,
        },
        "steps": config.steps,
        "batch_size": config.batch_size,
        "rho": config.rho,
        "results": results,
    }
    config.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten to {config.output}")


if __name__ == "__main__":
    main()
