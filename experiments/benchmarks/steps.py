"""Times one step of each method, and reads its FLOPs and memory from the compiled program.

    python -m experiments.benchmarks.steps

The methods take turns, step by step, so that a change in the speed of the machine affects all of
them. The first table compares with `optax.contrib.sam`, opaque and transparent (`opaque_mode`). A
transparent step is two calls, one per gradient. The second table has every method of the training
script. If steps differ in work (sparse-fisher renews its mask only at some steps), FLOPs are those
of the most expensive step. XLA counts the body of a loop once, so it counts only two of the three
samples of tilted, and on CPU one block of examples of every convolution.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bisam_jax
from experiments import data, models
from experiments.benchmarks.problems import (
    CLASSES,
    NETWORKS,
    losses_of,
    random_inputs,
    shape_of,
)
from experiments.config import methods
from experiments.config.config import check_ranges
from experiments.config.hyperparameters import Range
from experiments.step import train_step
from experiments.step.method import BuiltMethod, build_method
from experiments.system import command_line, exhaustion, machine


@dataclasses.dataclass(frozen=True)
class StepsOptions:
    """The command line: what to time."""

    steps: int = 100
    """Number of timed steps of each method."""
    batch_size: int = 128
    """Examples per step."""
    rho: float = 0.05
    """Radius of the perturbation."""
    network: Literal["mlp", "cnn", "resnet20", "text-transformer", "both"] = "both"
    """A perceptron 784-512-512-10, a small convolutional network, ResNet-20, an encoder of texts
    of 64 tokens, or the first two."""
    family: bool = True
    """Also time every method of the training script."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        check_ranges(self, {"steps": Range(2), "batch_size": Range(2), "rho": Range(0)})


class Subject(NamedTuple):
    """A method to time. A step is `calls` calls of `update`, which returns parameters and state."""

    name: str
    update: Callable
    init: Callable
    calls: int = 1


def subjects(loss_fn: Callable, q: Callable, rho: float) -> list[Subject]:
    """Returns the compared methods, optax's included, all with the same base optimizer."""
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
    """Returns every method of the training script, ascending cross-entropy and BiSAM's -log."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels

    def as_batch(batch: data.Split) -> train_step.Batch:
        return train_step.Batch(*batch, positions=jnp.arange(len(batch.labels)))

    def subject(name: str, perturbation: str) -> Subject:
        values = methods.PERTURBATIONS[perturbation] | methods.METHODS[name].defaults | {"rho": rho}

        def method(batch: data.Split) -> BuiltMethod:
            return build_method(name, perturbation, optimizer, values, batch_like=as_batch(batch))

        def update(params: Any, state: Any, batch: data.Split) -> tuple:
            full = train_step.TrainState(params=params, stats=stats, **state)
            new, _ = train_step.make_step(apply, method(batch), loss)(full, as_batch(batch))
            kept = {name: getattr(new, name) for name in state}
            return new.params, kept

        def init(params: Any, batch: data.Split) -> dict[str, Any]:
            key = jax.random.key(0)
            state = train_step.init_state(params, stats, method(batch), key)._asdict()
            return {name: state[name] for name in state if name not in ("params", "stats")}

        return Subject(f"{name}, {perturbation}", update, init)

    # The other methods are cases of these.
    names = [name for name, spec in methods.METHODS.items() if spec.ascends is None]
    return [subject(methods.PLAIN, "ce")] + [
        subject(name, perturbation)
        for name in names
        if methods.METHODS[name].perturbs_weights
        for perturbation in ("ce", "log")
    ]


def time_steps(network: str, options: StepsOptions) -> dict[str, list[dict[str, Any]]]:
    """Returns the tables "beside optax" and "family", with a row per method."""
    apply, params, stats = models.create(
        network, shape_of(network), CLASSES, seed=0, **NETWORKS[network][1]
    )
    keys = jax.random.split(jax.random.key(0))
    batch = data.Split(
        random_inputs(network, options.batch_size, keys[0]),
        jax.random.randint(keys[1], (options.batch_size,), 0, CLASSES),
    )
    tables = {"beside optax": subjects(*losses_of(apply, stats), options.rho)}
    if options.family:
        tables["family"] = family(apply, params, stats, options.rho)
    return {
        title: _measure(subjects, params, batch, options.steps)
        for title, subjects in tables.items()
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
    """Returns the seconds of each step of each program, after a warm-up of `steps // 10`."""
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


def steps_as_text(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as text, with time and FLOPs relative to the first."""
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
    options = command_line.parse(StepsOptions, __doc__ or "", args)
    known = {**machine.versions(), **machine.hardware()}
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    for network in ["mlp", "cnn"] if options.network == "both" else [options.network]:
        for title, rows in time_steps(network, options).items():
            heading = f"{network} {NETWORKS[network][0]}, batch {options.batch_size}, {title}"
            print(f"\n{heading}\n{steps_as_text(rows)}", flush=True)


if __name__ == "__main__":
    exhaustion.run(main)
