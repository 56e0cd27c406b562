"""The training step, as a pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bisam_jax
from experiments.data import Split
from experiments.methods import Method, PerExampleLoss


class TrainState(NamedTuple):
    """Everything that a step changes, and the key that all of a run's chance comes from."""

    step: jax.Array
    key: jax.Array
    params: Any
    stats: Any
    method: optax.OptState
    optimizer: optax.OptState
    previous_batch: Any = None


class Keys(NamedTuple):
    """A run's independent streams of chance: fold in the epoch, or the step."""

    order: jax.Array
    augmentation: jax.Array
    dropout: jax.Array


Step = Callable[[TrainState, Split], tuple[TrainState, jax.Array]]


def keys_of(state: TrainState) -> Keys:
    """The streams of a run, the same at each of its steps."""
    return Keys(*jax.random.split(state.key, len(Keys._fields)))


def init_state(
    params: Any, stats: Any, method: Method, example_batch: Split, key: jax.Array
) -> TrainState:
    """The state before the first step; `example_batch` gives shapes and types."""
    previous = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example_batch)
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        key=key,
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

    Dropout takes the same key in all passes of a step; batch statistics are the clean pass's.
    """
    ascended = method.perturbation_loss or loss

    def step(state: TrainState, batch: Split) -> tuple[TrainState, jax.Array]:
        forward = _forward(apply, state)

        def losses_of(params: Any, part: Split) -> jax.Array:
            return loss(forward(params, part.images)[0], part.labels)

        def mean_ascended(params: Any, part: Split) -> tuple[jax.Array, Any]:
            logits, stats = forward(params, part.images)
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
        new_state = _descend(state, method, grads, method_state, stats)
        if method.needs_previous_batch:
            new_state = new_state._replace(previous_batch=batch)
        return new_state, losses.mean()

    return step


def make_step_in_parts(
    apply: Callable[..., tuple[jax.Array, Any]],
    method: Method,
    loss: PerExampleLoss,
    *,
    group_size: int | None,
    microbatch_size: int | None,
) -> Step:
    """As :func:`make_step`, for methods that ask for no more than gradients.

    Batch normalisation sees one group or microbatch at a time, and its statistics are the mean
    over them; dropout takes the same key in each.

    Args:
        apply: the model.
        method: what is done with the second gradient.
        loss: the training loss.
        group_size: examples that share a perturbation (m-sharpness), or None for all.
        microbatch_size: examples that are in memory at once, or None for all.
    """

    def step(state: TrainState, batch: Split) -> tuple[TrainState, jax.Array]:
        forward = _forward(apply, state)

        def mean_of(descended: PerExampleLoss) -> Callable:
            def mean(params: Any, part: Split) -> tuple[jax.Array, Any]:
                logits, stats = forward(params, part.images)
                return descended(logits, part.labels).mean(), (loss(logits, part.labels), stats)

            return mean

        q = method.perturbation_loss
        value_and_grad = bisam_jax.value_and_grad(
            method.transformation,
            mean_of(loss),
            None if q is None else mean_of(q),
            has_aux=True,
            group_size=group_size,
            microbatch_size=microbatch_size,
        )
        (_, (losses, stats)), grads, method_state = value_and_grad(
            state.params, state.method, batch
        )
        return _descend(state, method, grads, method_state, stats), losses.mean()

    return step


def _forward(apply: Callable, state: TrainState) -> Callable:
    """The training model of one step: its key and its statistics."""
    key = jax.random.fold_in(keys_of(state).dropout, state.step)
    return lambda params, images: apply(params, state.stats, images, train=True, key=key)


def _descend(
    state: TrainState, method: Method, grads: optax.Updates, method_state: Any, stats: Any
) -> TrainState:
    updates, optimizer_state = method.optimizer.update(grads, state.optimizer, state.params)
    return state._replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        stats=stats,
        method=method_state,
        optimizer=optimizer_state,
    )
