"""The training step and the epoch, as pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bisam_jax
from experiments.data import Split
from experiments.methods import Method, PerExampleLoss


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array
    params: Any
    stats: Any
    method: optax.OptState
    optimizer: optax.OptState


Step = Callable[[TrainState, Split], tuple[TrainState, jax.Array]]


def init_state(
    params: Any, stats: Any, method: Method, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        stats=stats,
        method=method.transformation.init(params),
        optimizer=optimizer.init(params),
    )


def cross_entropy(label_smoothing: float) -> PerExampleLoss:
    """The training loss per example; smoothing spreads its share over the other classes."""

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        classes = logits.shape[-1]
        off = label_smoothing / (classes - 1)
        targets = jax.nn.one_hot(labels, classes) * (1 - label_smoothing - off) + off
        return optax.losses.softmax_cross_entropy(logits, targets)

    return loss


def make_step(
    apply: Callable[..., tuple[jax.Array, Any]],
    method: Method,
    optimizer: optax.GradientTransformation,
    loss: PerExampleLoss,
) -> Step:
    """A step on one batch; returns the new state and the training loss of the clean pass."""

    def step(state: TrainState, batch: Split) -> tuple[TrainState, jax.Array]:
        def mean_of(per_example: PerExampleLoss) -> Callable:
            def fn(params: Any, batch: Split) -> tuple[jax.Array, Any]:
                logits, stats = apply(params, state.stats, batch.images, train=True)
                return per_example(logits, batch.labels).mean(), (logits, stats)

            return fn

        ascended = method.perturbation_loss
        sharp = bisam_jax.value_and_grad(
            method.transformation,
            mean_of(loss),
            None if ascended is None else mean_of(ascended),
            has_aux=True,
        )
        (_, (logits, stats)), grads, method_state = sharp(state.params, state.method, batch)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            stats=stats,
            method=method_state,
            optimizer=optimizer_state,
        )
        return new_state, loss(logits, batch.labels).mean()

    return step


def make_epoch(
    step: Step, state: TrainState, data: Split, key: jax.Array, batch_size: int, *, scan: bool
) -> Callable[[TrainState, int], tuple[TrainState, jax.Array]]:
    """Compiles `epoch(state, number)`, which returns the new state and the loss of each step.

    The order of the examples is that of `number` and `key` alone; the incomplete last batch is
    dropped. The state is donated.

    Args:
        step: the training step.
        state: gives shapes and types.
        data: the training split, on the device.
        key: for the order of the examples.
        batch_size: at most the number of examples.
        scan: whether an epoch is one launch, or one a step.
    """
    steps = len(data.labels) // batch_size

    @jax.jit
    def order_of(number: jax.Array) -> jax.Array:
        permutation = jax.random.permutation(jax.random.fold_in(key, number), len(data.labels))
        return permutation[: steps * batch_size].reshape(steps, batch_size)

    def on_batch(state: TrainState, data: Split, indices: jax.Array) -> tuple:
        return step(state, jax.tree.map(lambda x: x[indices], data))

    def one_step(state: TrainState, data: Split, order: jax.Array) -> tuple:
        return on_batch(state, data, order[state.step % steps])

    def all_steps(state: TrainState, data: Split, order: jax.Array) -> tuple:
        return jax.lax.scan(lambda state, indices: on_batch(state, data, indices), state, order)

    launch = jax.jit(all_steps if scan else one_step, donate_argnums=0)
    compiled = launch.lower(state, data, order_of(jnp.int32(0))).compile()

    def epoch(state: TrainState, number: int) -> tuple[TrainState, jax.Array]:
        order = order_of(jnp.int32(number))
        if scan:
            return compiled(state, data, order)
        losses = []
        for _ in range(steps):
            state, loss = compiled(state, data, order)
            losses.append(loss)
        return state, jnp.stack(losses)

    return epoch


def make_accuracy(apply: Callable[..., tuple[jax.Array, Any]]) -> Callable:
    """`accuracy(params, stats, split)`: the share of right predictions, a float32 scalar.

    NaN if a logit is not finite: the largest of such logits would be class 0.
    """

    @jax.jit
    def accuracy(params: Any, stats: Any, split: Split) -> jax.Array:
        logits, _ = apply(params, stats, split.images, train=False)
        right = jnp.mean(logits.argmax(-1) == split.labels)
        return jnp.where(jnp.isfinite(logits).all(), right, jnp.nan)

    return accuracy
