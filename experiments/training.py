"""The training step, as a pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bisam_jax
from experiments.data import Split
from experiments.devices import OneProgram
from experiments.methods import Method, PerExampleLoss

ONE_PROGRAM = OneProgram()


class TrainState(NamedTuple):
    """Everything that a step changes, and the key that all of a run's chance comes from."""

    step: jax.Array
    key: jax.Array
    params: Any
    stats: Any
    method: optax.OptState
    optimizer: optax.OptState
    previous_batch: Any = None


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


def keys_of(state: TrainState) -> Keys:
    """The streams of a run, the same at each of its steps."""
    return Keys(*jax.random.split(state.key, len(Keys._fields)))


def init_state(
    params: Any, stats: Any, method: Method, example_batch: Batch, key: jax.Array
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


def make_step(
    apply: Callable[..., tuple[jax.Array, Any]],
    method: Method,
    loss: PerExampleLoss,
    devices: OneProgram = ONE_PROGRAM,
) -> Step:
    """A step on one batch; returns the new state and the training loss of the clean pass.

    It passes everything that any method of the library asks for. What a method does not use is
    not computed: it is a function that is not called, or goes unused in the compiled program.

    Dropout takes the same key in all passes of a step; batch statistics are the clean pass's.

    Args:
        apply: the model.
        method: what is done with the second gradient.
        loss: the training loss.
        devices: those that share the batch, each of which runs this step.
    """
    ascended = method.perturbation_loss or loss

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        forward = _forward(apply, state)

        def losses_of(params: Any, part: Batch) -> jax.Array:
            return loss(forward(params, part)[0], part.labels)

        def mean_ascended(params: Any, part: Batch) -> tuple[jax.Array, Any]:
            logits, stats = forward(devices.enter(params), part)
            return devices.mean(ascended(logits, part.labels).mean()), (logits, stats)

        def mean_loss(params: Any, part: Batch) -> jax.Array:
            return devices.mean(losses_of(devices.enter(params), part).mean())

        def loss_of_one(params: Any, example: Batch) -> jax.Array:
            # A batch of one has no statistics: the running ones.
            logits, _ = apply(params, state.stats, example.images, train=False)
            return loss(logits, example.labels).mean()

        def fisher_scores(params: Any) -> Any:
            return devices.mean(bisam_jax.fisher_scores(loss_of_one, devices.enter(params), batch))

        def example_losses(params: Any, indices: jax.Array | None) -> jax.Array:
            params = devices.enter(params)
            if indices is None:
                return devices.joined(losses_of(params, batch))
            return devices.losses_at(losses_of, params, batch, indices)

        clean_pass = jax.value_and_grad(mean_ascended, has_aux=True)
        (_, (logits, stats)), ascent = clean_pass(state.params, batch)
        losses = loss(logits, batch.labels)
        extra_args: dict[str, Any] = {
            "loss_fn": lambda params: mean_loss(params, batch),
            "losses": devices.joined(losses),
            "example_losses_fn": example_losses,
            "fisher_scores_fn": fisher_scores,
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
        new_state = _descend(state, method, grads, method_state, devices.statistics(stats))
        if method.needs_previous_batch:
            new_state = new_state._replace(previous_batch=batch)
        return new_state, devices.mean(losses.mean())

    return step


def make_step_in_parts(
    apply: Callable[..., tuple[jax.Array, Any]],
    method: Method,
    loss: PerExampleLoss,
    *,
    group_size: int | None,
    microbatch_size: int | None,
    devices: OneProgram = ONE_PROGRAM,
) -> Step:
    """As :func:`make_step`, for methods that ask for no more than gradients.

    Batch normalisation sees one group or microbatch at a time, and its statistics are the mean
    over them.

    Args:
        apply: the model.
        method: what is done with the second gradient.
        loss: the training loss.
        group_size: examples that share a perturbation (m-sharpness), or None for all.
        microbatch_size: examples that are in memory at once, or None for all.
        devices: see :func:`make_step`. Both sizes are of what the step sees: one device's part.
    """
    # A group's perturbation is its own; without groups it is that of all devices.
    enter, mean_of_all = devices.enter, devices.mean
    if group_size is not None:
        enter = mean_of_all = lambda tree: tree

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        forward = _forward(apply, state)

        def mean_of(descended: PerExampleLoss) -> Callable:
            def mean(params: Any, part: Batch) -> tuple[jax.Array, Any]:
                logits, stats = forward(enter(params), part)
                mean = mean_of_all(descended(logits, part.labels).mean())
                return mean, (loss(logits, part.labels), stats)

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
        if group_size is not None:
            value_and_grad = devices.averaged(value_and_grad)
        (_, (losses, stats)), grads, method_state = value_and_grad(
            state.params, state.method, batch
        )
        new_state = _descend(state, method, grads, method_state, devices.statistics(stats))
        return new_state, devices.mean(losses.mean())

    return step


def _forward(apply: Callable, state: TrainState) -> Callable:
    """The training model of one step: its key and its statistics."""
    key = jax.random.fold_in(keys_of(state).dropout, state.step)

    def forward(params: Any, part: Batch) -> tuple[jax.Array, Any]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, part.positions)
        return apply(params, state.stats, part.images, train=True, keys=keys)

    return forward


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
