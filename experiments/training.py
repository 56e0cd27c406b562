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


class Batch(NamedTuple):
    """The examples of a step, or a part of them.

    Attributes:
        images: float32[batch, height, width, channels], normalised and augmented.
        labels: int32[batch].
        positions: int32[batch], the examples' places in the whole batch. Dropout draws by them, so
            that it is the same however the batch is split.
    """

    images: jax.Array
    labels: jax.Array
    positions: jax.Array


class Keys(NamedTuple):
    """A run's independent streams of chance: fold in the epoch, or the step."""

    order: jax.Array
    augmentation: jax.Array
    dropout: jax.Array


Step = Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]
StepOnStored = Callable[[TrainState, Split], tuple[TrainState, jax.Array]]
Prepare = Callable[[jax.Array, jax.Array], jax.Array]
When = Callable[[Any], Any]


def keys_of(state: TrainState) -> Keys:
    """The streams of a run, the same at each of its steps."""
    return Keys(*jax.random.split(state.key, len(Keys._fields)))


def init_state(params: Any, stats: Any, method: Method, key: jax.Array) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        key=key,
        params=params,
        stats=stats,
        method=method.transformation.init(params),
        optimizer=method.optimizer.init(params),
    )


def cross_entropy(label_smoothing: float) -> PerExampleLoss:
    """The training loss per example; smoothing spreads its share over the other classes."""

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        classes = logits.shape[-1]
        off = label_smoothing / (classes - 1)
        targets = jax.nn.one_hot(labels, classes) * (1 - label_smoothing - off) + off
        return optax.losses.softmax_cross_entropy(logits, targets)

    return loss


def prepared(stored: Split, prepare: Prepare, state: TrainState) -> Batch:
    """A batch of stored images as the model sees it.

    Args:
        stored: from the data set.
        prepare: normalises and augments images, with a key of the step's own.
        state: tells the step.
    """
    key = jax.random.fold_in(keys_of(state).augmentation, state.step)
    positions = jnp.arange(len(stored.labels), dtype=jnp.int32)
    return Batch(prepare(key, stored.images), stored.labels, positions)


def whenever(start: int, every: int) -> When | None:
    """Whether to perturb at a step: every so many from `start` on; None if at all."""
    if (start, every) == (0, 1):
        return None
    return lambda step: (step >= start) & ((step - start) % every == 0)


def make_step(
    apply: Callable[..., tuple[jax.Array, Any]],
    method: Method,
    loss: PerExampleLoss,
    *,
    when: When | None = None,
    group_size: int | None = None,
    microbatch_size: int | None = None,
    axis_name: str | None = None,
) -> Step:
    """A step on one batch; returns the new state and the training loss of the clean pass.

    Dropout takes the same key in all passes of a step; batch statistics are the clean pass's, and
    the mean over groups, microbatches and devices.

    Args:
        apply: the model.
        method: what is perturbed how.
        loss: the training loss.
        when: whether to perturb, by the number of the step; None for always.
        group_size: examples that share a perturbation (m-sharpness), or None for all.
        microbatch_size: examples that are in memory at once, or None for all.
        axis_name: of the devices that share the batch, each of which runs this step. Both sizes
            are those of one device.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        forward = _forward(apply, state, microbatch_size or len(batch.labels))

        def logits_fn(params: Any, part: Batch) -> tuple[jax.Array, Any]:
            logits, stats = forward(params, part)
            return logits, (loss(logits, part.labels).mean(), stats)

        def loss_fn(per_example: PerExampleLoss) -> Callable:
            return bisam_jax.logits_loss(
                logits_fn, lambda logits, part: per_example(logits, part.labels)
            )

        q = method.perturbation_loss
        value_and_grad = bisam_jax.value_and_grad(
            method.transformation,
            loss_fn(loss),
            None if q is None else loss_fn(q),
            has_aux=True,
            when=when,
            group_size=group_size,
            microbatch_size=microbatch_size,
            axis_name=axis_name,
        )
        (_, (mean_loss, stats)), grads, method_state = value_and_grad(
            state.params, state.method, batch, step=state.step
        )
        updates, optimizer_state = method.optimizer.update(grads, state.optimizer, state.params)
        new_state = state._replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            stats=stats,
            method=method_state,
            optimizer=optimizer_state,
        )
        return new_state, mean_loss

    return step


def _forward(apply: Callable, state: TrainState, at_once: int) -> Callable:
    """The training model of one step: its key and its statistics."""
    key = jax.random.fold_in(keys_of(state).dropout, state.step)

    def forward(params: Any, part: Batch) -> tuple[jax.Array, Any]:
        if len(part.labels) == 1 < at_once:
            # A single example has no statistics: the running ones.
            return apply(params, state.stats, part.images, train=False)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, part.positions)
        return apply(params, state.stats, part.images, train=True, keys=keys)

    return forward
