"""Steps on batches of a data set: held on the device, or streamed from the host.

A run is a row of launches, each of a few steps of one epoch. What a step sees depends on its number
and on the run's key alone, so that a run that begins in the middle sees what an uninterrupted one
would have.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any, Protocol

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


class InMemory:
    """Launches on a data set that is on the device; compiled once, when made.

    An epoch has its own order of the examples; the incomplete last batch is dropped.

    Args:
        step: the training step on stored images.
        state: gives shapes and types.
        data: the training split, on every device.
        batch_size: at most the number of examples.
        steps_at_once: the longest launch. With one there is no loop in the program.
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
        self._steps_per_epoch = steps_per_epoch = len(data.labels) // batch_size
        self._epoch = -1

        def order_of(state: TrainState, epoch: jax.Array) -> jax.Array:
            key = jax.random.fold_in(keys_of(state).order, epoch)
            permutation = jax.random.permutation(key, len(data.labels))
            return permutation[: steps_per_epoch * batch_size].reshape(steps_per_epoch, batch_size)

        def one(state: TrainState, data: Split, order: jax.Array, number: jax.Array) -> tuple:
            # Each device takes the rows of its own.
            indices = layout.constrained(order[number % steps_per_epoch])
            return step(state, layout.constrained(jax.tree.map(lambda x: x[indices], data)))

        def single(state: TrainState, data: Split, order: jax.Array, start: Any, _: Any) -> tuple:
            state, loss = one(state, data, order, start)
            return state, loss[None]

        # A loop of unknown length: launches of every length share one compiled program.
        def several(
            state: TrainState, data: Split, order: jax.Array, start: Any, stop: Any
        ) -> tuple:
            def body(number: jax.Array, carry: tuple) -> tuple:
                state, losses = carry
                state, loss = one(state, data, order, number)
                return state, losses.at[number - start].set(loss)

            losses = jnp.zeros(steps_at_once, jnp.float32)
            return jax.lax.fori_loop(start, stop, body, (state, losses))

        self._order_of = jax.jit(order_of, out_shardings=layout.whole)
        self._order = self._order_of(state, np.int32(0))
        launch = layout.jit(single if steps_at_once == 1 else several, state)
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
