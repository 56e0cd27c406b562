"""The training step, as a pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bisam_jax
from experiments.data import Split
from experiments.step.leaves import TrainedPart
from experiments.step.method import BuiltMethod, PerExampleLoss


class TrainState(NamedTuple):
    """Everything that a step changes, and the key of all randomness of a run."""

    step: jax.Array
    key: jax.Array
    params: Any
    stats: Any
    method: optax.OptState
    optimizer: optax.OptState


class Batch(NamedTuple):
    """The examples of a step, or a part of them.

    Attributes:
        images: float32[batch, height, width, channels], normalized and augmented; the tokens of
            texts.
        labels: int32[batch].
        positions: int32[batch], positions in the whole batch. Dropout masks depend on them, and
            not on how the batch is split.
    """

    images: jax.Array
    labels: jax.Array
    positions: jax.Array


class Keys(NamedTuple):
    """The independent keys of a run. Fold in the epoch or the step before use."""

    order: jax.Array
    augmentation: jax.Array
    dropout: jax.Array


Step = Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]
StepOnStored = Callable[[TrainState, Split], tuple[TrainState, jax.Array]]
Prepare = Callable[[jax.Array, jax.Array], jax.Array]
When = Callable[[Any], Any]
ALL = TrainedPart()


def keys_of(state: TrainState) -> Keys:
    """Returns the keys of a run, the same at every step."""
    return Keys(*jax.random.split(state.key, len(Keys._fields)))


def init_state(
    params: Any, stats: Any, method: BuiltMethod, key: jax.Array, trained: TrainedPart = ALL
) -> TrainState:
    """Returns the state before the first step. Frozen parameters have no state."""
    own = trained.of(params)
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        key=key,
        params=params,
        stats=stats,
        method=method.transformation.init(own),
        optimizer=method.optimizer.init(own),
    )


def cross_entropy(label_smoothing: float) -> PerExampleLoss:
    """Returns the training loss per example: cross-entropy with smoothed labels."""

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        classes = logits.shape[-1]
        off = label_smoothing / (classes - 1)
        targets = jax.nn.one_hot(labels, classes) * (1 - label_smoothing - off) + off
        return optax.losses.softmax_cross_entropy(logits, targets)

    return loss


def prepared(stored: Split, prepare: Prepare, state: TrainState) -> Batch:
    """Returns a batch for the model, from stored images.

    Args:
        stored: images and labels from the data set.
        prepare: normalizes and augments images, given a key of the step.
        state: holds the number of the step and the key of the run.
    """
    key = jax.random.fold_in(keys_of(state).augmentation, state.step)
    positions = jnp.arange(len(stored.labels), dtype=jnp.int32)
    return Batch(prepare(key, stored.images), stored.labels, positions)


def whenever(start: int, every: int) -> When | None:
    """Returns `when(step)`, true at every `every`-th step from `start`; None if always true."""
    if (start, every) == (0, 1):
        return None
    return lambda step: (step >= start) & ((step - start) % every == 0)


def make_step(
    apply: Callable[..., tuple[jax.Array, Any]],
    method: BuiltMethod,
    loss: PerExampleLoss,
    *,
    when: When | None = None,
    group_size: int | None = None,
    microbatch_size: int | None = None,
    axis_name: str | None = None,
    trained: TrainedPart = ALL,
) -> Step:
    """Makes a step on one batch, which returns the new state and the clean training loss.

    All passes of a step use the same dropout key. Batch statistics come from the clean pass, and
    are averaged over groups, microbatches and devices.

    Args:
        apply: the model.
        method: the method and the base optimizer.
        loss: the training loss.
        when: maps the number of the step to whether to perturb; None to always perturb.
        group_size: number of examples that share a perturbation (m-sharpness); None for all.
        microbatch_size: number of examples in memory at once; None for all.
        axis_name: axis of the devices that share the batch, if each of them runs this step. Both
            sizes then count the examples of one device.
        trained: which parameters are trained. Only these have gradients and are perturbed.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        forward = _forward(apply, state, microbatch_size or len(batch.labels))

        def logits_fn(params: Any, part: Batch) -> tuple[jax.Array, Any]:
            logits, stats = forward(trained.into(state.params, params), part)
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
        own = trained.of(state.params)
        (_, (mean_loss, stats)), grads, method_state = value_and_grad(
            own, state.method, batch, step=state.step
        )
        updates, optimizer_state = method.optimizer.update(grads, state.optimizer, own)
        new_state = state._replace(
            step=state.step + 1,
            params=trained.into(state.params, optax.apply_updates(own, updates)),
            stats=stats,
            method=method_state,
            optimizer=optimizer_state,
        )
        return new_state, mean_loss

    return step


def _forward(apply: Callable, state: TrainState, at_once: int) -> Callable:
    """Returns the training model with the step's dropout key and its batch statistics."""
    key = jax.random.fold_in(keys_of(state).dropout, state.step)

    def forward(params: Any, part: Batch) -> tuple[jax.Array, Any]:
        if len(part.labels) == 1 < at_once:
            # A single example has no batch statistics: use the running ones.
            return apply(params, state.stats, part.images, train=False)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, part.positions)
        return apply(params, state.stats, part.images, train=True, keys=keys)

    return forward
