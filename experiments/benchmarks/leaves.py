"""Times tracing and compilation of a step on parameters of many leaves.

    python -m experiments.benchmarks.leaves --leaves 500 1000

A step written by hand, `optax.contrib.sam` and every method take turns, on the same loss. A method
that takes more than two gradients has a longer program, so the last column is per gradient.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bisam_jax
from experiments.config import methods
from experiments.config.config import check_ranges
from experiments.config.hyperparameters import Range
from experiments.step.method import build_method
from experiments.system import command_line, exhaustion, machine

RHO, RATE = 0.05, 0.1
EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class LeavesOptions:
    """The command line: what to time."""

    leaves: tuple[int, ...] = (500, 1000)
    """Numbers of leaves."""
    repeats: int = 3
    """Number of compilations of each step, of which the median counts."""
    methods: tuple[str, ...] = tuple(
        name for name, spec in methods.METHODS.items() if spec.ascends is None and not spec.attack
    )
    """Methods of experiments.train."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        check_ranges(self, {"leaves": Range(1), "repeats": Range(1)})


def losses(params: Any, batch: jax.Array) -> jax.Array:
    """Returns a loss per example that needs every leaf."""
    # Stacked: XLA on CPU compiles a long chain of sums in quadratic time.
    parts = [jnp.square(batch @ leaf).sum(-1) for leaf in jax.tree.leaves(params)]
    return jnp.stack(parts).sum(0)


def mean_loss(params: Any, batch: jax.Array) -> jax.Array:
    """Returns the mean of :func:`losses`."""
    return losses(params, batch).mean()


def by_hand(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
    """A SAM step as one writes it without a library."""
    gradient = jax.grad(mean_loss)(params, batch)
    squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)]
    norm = jnp.sqrt(jnp.stack(squares).sum())
    worst = jax.tree.map(lambda w, g: w + RHO * g / norm, params, gradient)
    gradient = jax.grad(mean_loss)(worst, batch)
    return jax.tree.map(lambda w, g: w - RATE * g, params, gradient), state


def steps(names: Sequence[str], batch: jax.Array) -> dict[str, tuple[Callable, Callable, float]]:
    """Returns the steps: a function, what makes its state, and its number of gradients."""
    base, adversary = optax.sgd(RATE), optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    opaque = optax.contrib.sam(base, adversary, opaque_mode=True)

    def by_optax(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
        gradient = jax.grad(mean_loss)(params, batch)
        updates, state = opaque.update(
            gradient, state, params, grad_fn=lambda point, _: jax.grad(mean_loss)(point, batch)
        )
        return optax.apply_updates(params, updates), state

    known: dict[str, tuple[Callable, Callable, float]] = {
        "by hand": (by_hand, lambda params: (), 2),
        "optax.contrib.sam, opaque": (by_optax, opaque.init, 2),
    }
    for name in names:
        known[name] = _step_of(name, base, batch)
    return known


def _step_of(
    name: str, base: optax.GradientTransformation, batch: jax.Array
) -> tuple[Callable, Callable, float]:
    values = methods.METHODS[name].defaults
    built = build_method(name, "ce", base, values, batch_like=batch)
    tx = optax.chain(built.transformation, built.optimizer)

    one_by_one = methods.METHODS[name].takes_single_examples
    of_batch = bisam_jax.logits_loss(losses, lambda z, b: z if one_by_one else z.mean())
    value_and_grad = bisam_jax.value_and_grad(tx, of_batch)

    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
        _, updates, state = value_and_grad(params, state, batch)
        return optax.apply_updates(params, updates), state

    return step, tx.init, methods.gradients(name, "ce", values)


def measured(leaves: int, options: LeavesOptions) -> list[tuple[str, float, float, float]]:
    """Returns name, seconds to trace, seconds to compile and number of gradients of each step."""
    params = {f"leaf {number}": jnp.ones((3, 2)) for number in range(leaves)}
    batch = jnp.ones((EXAMPLES, 3))
    known = steps(options.methods, batch)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in known}
    for _ in range(options.repeats):
        for name, (step, init, _) in known.items():
            state = jax.eval_shape(init, params)
            begun = time.perf_counter()
            # A new function, since JAX remembers the program of an old one.
            lowered = jax.jit(lambda *args, step=step: step(*args)).lower(params, state, batch)
            traced = time.perf_counter()
            lowered.compile()
            seconds[name].append((traced - begun, time.perf_counter() - traced))
    return [
        (
            name,
            statistics.median(trace for trace, _ in times),
            statistics.median(compiling for _, compiling in times),
            known[name][2],
        )
        for name, times in seconds.items()
    ]


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    options = command_line.parse(LeavesOptions, __doc__ or "", args)
    known = {**machine.versions(), **machine.hardware()}
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    for leaves in options.leaves:
        print(f"\n{leaves} leaves")
        print(
            f"{'step':28}{'trace s':>9}{'compile s':>11}{'sum':>8}{'ratio':>8}{'per gradient':>14}"
        )
        rows = measured(leaves, options)
        first = rows[0][1] + rows[0][2]
        for name, trace, compiling, gradients in rows:
            total = trace + compiling
            ratio, per_gradient = total / first, total / first * 2 / gradients
            print(
                f"{name:28}{trace:9.2f}{compiling:11.2f}{total:8.2f}{ratio:8.2f}{per_gradient:14.2f}",
                flush=True,
            )


if __name__ == "__main__":
    exhaustion.run(main)
