"""Steps on batches of a data set: held on the device, or streamed from the host.

A run is a row of launches, each of a few steps of one epoch. What a step sees depends on its number
and on the run's key alone, so that a run that begins in the middle sees what an uninterrupted one
would have.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Split, Stream
from experiments.layout import Layout
from experiments.training import StepOnStored, TrainState, keys_of

_LAUNCHES_AHEAD = 2


class Launch(Protocol):
    """Makes steps; donates the state."""

    steps_at_once: int

    def __call__(self, state: TrainState, start: int, stop: int) -> tuple[TrainState, jax.Array]:
        """From step `start` to step `stop`, at most `steps_at_once` later in the same epoch.

        The losses are float32[steps_at_once], the first `stop - start` of them set.
        """
        ...


class Steps(NamedTuple):
    """A run's steps on a split in memory, as pure functions.

    Attributes:
        order_of: from state and epoch to the examples of its steps, int32[steps, batch]. An epoch
            has its own order; the incomplete last batch is dropped.
        launch: from state, split, order, and first and last number of steps of one epoch, to the
            next state and the losses, float32[steps_at_once].
    """

    order_of: Callable[[TrainState, jax.Array], jax.Array]
    launch: Callable[[TrainState, Split, jax.Array, Any, Any], tuple[TrainState, jax.Array]]


def steps_on(
    step: StepOnStored,
    examples: int,
    batch_size: int,
    steps_at_once: int,
    constrained: Callable[[Any], Any] = lambda batch: batch,
) -> Steps:
    """The steps on a split of `examples`.

    Args:
        step: the training step on stored images.
        examples: how many.
        batch_size: at most that.
        steps_at_once: the longest launch. With one there is no loop in the program.
        constrained: lays a batch over devices.
    """
    steps_per_epoch = examples // batch_size

    def order_of(state: TrainState, epoch: jax.Array) -> jax.Array:
        key = jax.random.fold_in(keys_of(state).order, epoch)
        permutation = jax.random.permutation(key, examples)
        return permutation[: steps_per_epoch * batch_size].reshape(steps_per_epoch, batch_size)

    def one(state: TrainState, data: Split, order: jax.Array, number: jax.Array) -> tuple:
        # Each device takes the rows of its own.
        indices = constrained(order[number % steps_per_epoch])
        # The same for all replicas, so that what depends on the step is decided once for all.
        state = state._replace(step=number)
        return step(state, constrained(jax.tree.map(lambda x: x[indices], data)))

    def single(state: TrainState, data: Split, order: jax.Array, start: Any, _: Any) -> tuple:
        state, loss = one(state, data, order, start)
        return state, loss[None]

    # A loop of unknown length: launches of every length share one compiled program.
    def several(state: TrainState, data: Split, order: jax.Array, start: Any, stop: Any) -> tuple:
        def body(number: jax.Array, carry: tuple) -> tuple:
            state, losses = carry
            state, loss = one(state, data, order, number)
            return state, losses.at[number - start].set(loss)

        losses = jnp.zeros(steps_at_once, jnp.float32)
        return jax.lax.fori_loop(start, stop, body, (state, losses))

    return Steps(order_of, single if steps_at_once == 1 else several)


class InMemory:
    """Launches on a data set that is on the device; compiled once, when made.

    Args:
        step: the training step on stored images.
        state: gives shapes and types.
        data: the training split, on every device.
        batch_size: at most the number of examples.
        steps_at_once: the longest launch.
        layout: of state and batches over the devices.
    """

    def __init__(
        self,
        step: StepOnStored,
        state: TrainState,
        data: Split,
        batch_size: int,
        steps_at_once: int,
        layout: Layout,
    ) -> None:
        self.steps_at_once = steps_at_once
        self._data = data
        examples = len(data.labels)
        self._steps_per_epoch = examples // batch_size
        self._epoch = -1
        steps = steps_on(step, examples, batch_size, steps_at_once, layout.constrained)
        self._order_of = jax.jit(steps.order_of, out_shardings=layout.whole)
        self._order = self._order_of(state, np.int32(0))
        launch = layout.jit(steps.launch, state)
        number = np.int32(0)
        with layout.context():
            self.compiled = launch.lower(state, data, self._order, number, number).compile()

    def __call__(self, state: TrainState, start: int, stop: int) -> tuple[TrainState, jax.Array]:
        """See :class:`Launch`."""
        epoch = start // self._steps_per_epoch
        if epoch != self._epoch:
            self._order, self._epoch = self._order_of(state, np.int32(epoch)), epoch
        state, losses = self.compiled(
            state, self._data, self._order, np.int32(start), np.int32(stop)
        )
        return state, losses


class Streamed:
    """Launches of one step on batches that come from the host; compiled once, when made.

    Args:
        step: the training step on stored images.
        state: gives shapes and types.
        data: the training split.
        image_shape: height, width, channels.
        batch_size: at most the number of examples.
        seed: of the examples' order and of the crops.
        epochs: of the run.
        layout: of state and batches over the devices.
    """

    steps_at_once = 1

    def __init__(
        self,
        step: StepOnStored,
        state: TrainState,
        data: Stream,
        image_shape: tuple[int, ...],
        batch_size: int,
        seed: int,
        epochs: int,
        layout: Layout,
    ) -> None:
        def single(state: TrainState, batch: Split) -> tuple:
            state, loss = step(state, batch)
            return state, loss[None]

        def batches_from(first_step: int) -> Iterator[Split]:
            here = layout.rows_here(batch_size)
            rows = data.training_batches(batch_size, seed, first_step, epochs, here)
            return (layout.batch(batch, batch_size) for batch in rows)

        self._batches_from = batches_from
        self._batches: Iterator[Split] | None = None
        shapes = Split(
            jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8, sharding=layout.split),
            jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=layout.split),
        )
        with layout.context():
            self.compiled = layout.jit(single, state).lower(state, shapes).compile()

    def __call__(self, state: TrainState, start: int, stop: int) -> tuple[TrainState, jax.Array]:
        """See :class:`Launch`."""
        if self._batches is None:
            self._batches = self._batches_from(start)
        return self.compiled(state, next(self._batches))


def run(
    launch: Launch,
    state: TrainState,
    start: int,
    stop: int,
    note: Callable[[list[float]], None],
    interrupted: Callable[[int], bool] = lambda step: False,
) -> tuple[TrainState, int]:
    """Launches from `start` up to `stop`, in the same epoch; returns the state and its step.

    Args:
        launch: makes the steps.
        state: at step `start`; donated.
        start: a step.
        stop: a later one.
        note: is given the losses of each launch once they are there.
        interrupted: asked before each launch, with its first step, whether to stop there.
    """
    under_way: collections.deque[tuple[jax.Array, int]] = collections.deque()

    def note_next() -> None:
        losses, steps = under_way.popleft()
        note(np.asarray(losses)[:steps].tolist())

    while start < stop and not interrupted(start):
        end = min(stop, start + launch.steps_at_once)
        state, losses = launch(state, start, end)
        under_way.append((losses, end - start))
        start = end
        # The device never waits for the host, nor does a signal for many launches.
        if len(under_way) > _LAUNCHES_AHEAD:
            note_next()
    while under_way:
        note_next()
    return state, start
