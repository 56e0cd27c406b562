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
    previous_batch: Any = None


Step = Callable[[TrainState, Split], tuple[TrainState, jax.Array]]


def init_state(params: Any, stats: Any, method: Method, example_batch: Split) -> TrainState:
    """The state before the first step; `example_batch` gives shapes and types."""
    previous = jax.tree.map(jnp.zeros_like, example_batch)
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        stats=stats,
        method=method.transformation.init(params),
        optimizer=method.optimizer.init(params),
        previous_batch=previous if method.needs_previous_batch else None,
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
    apply: Callable[..., tuple[jax.Array, Any]], method: Method, loss: PerExampleLoss
) -> Step:
    """A step on one batch; returns the new state and the training loss of the clean pass.

    It passes everything that any method of the library asks for. What a method does not use is
    not computed: it is a function that is not called, or goes unused in the compiled program.
    """
    ascended = method.perturbation_loss or loss

    def step(state: TrainState, batch: Split) -> tuple[TrainState, jax.Array]:
        def losses_of(params: Any, part: Split) -> jax.Array:
            return loss(apply(params, state.stats, part.images, train=True)[0], part.labels)

        def mean_ascended(params: Any, part: Split) -> tuple[jax.Array, Any]:
            logits, stats = apply(params, state.stats, part.images, train=True)
            return ascended(logits, part.labels).mean(), (logits, stats)

        def mean_loss(params: Any, part: Split) -> jax.Array:
            return losses_of(params, part).mean()

        def loss_of_one(params: Any, example: Split) -> jax.Array:
            # A batch of one has no statistics: the running ones.
            logits, _ = apply(params, state.stats, example.images, train=False)
            return loss(logits, example.labels).mean()

        def example_losses(params: Any, indices: jax.Array | None) -> jax.Array:
            part = batch if indices is None else jax.tree.map(lambda x: x[indices], batch)
            return losses_of(params, part)

        clean_pass = jax.value_and_grad(mean_ascended, has_aux=True)
        (_, (logits, stats)), ascent = clean_pass(state.params, batch)
        losses = loss(logits, batch.labels)
        extra_args: dict[str, Any] = {
            "loss_fn": lambda params: mean_loss(params, batch),
            "losses": losses,
            "example_losses_fn": example_losses,
            "fisher_scores_fn": lambda params: bisam_jax.fisher_scores(loss_of_one, params, batch),
            "batch_loss_fn": mean_loss,
            "batch": batch,
            "previous_batch": state.previous_batch,
        }
        if method.perturbation_loss is not None:
            extra_args |= {
                "clean_grad_fn": lambda: jax.grad(mean_loss)(state.params, batch),
                "ascent_loss_fn": lambda params: mean_ascended(params, batch)[0],
                "batch_perturbation_loss_fn": lambda params, part: mean_ascended(params, part)[0],
            }
        grads, method_state = method.transformation.update(
            ascent, state.method, state.params, **extra_args
        )
        updates, optimizer_state = method.optimizer.update(grads, state.optimizer, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            stats=stats,
            method=method_state,
            optimizer=optimizer_state,
            previous_batch=batch if method.needs_previous_batch else None,
        )
        return new_state, losses.mean()

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
