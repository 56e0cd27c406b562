"""Feeds the examples of a split to the step: from memory, or streamed from disk.

A run is a sequence of launches, each a few steps of one epoch. The examples of a step depend only
on its number and the key of the run, so a resumed run sees what an uninterrupted one would see.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Part, Split, Stream
from experiments.step.epochs import steps_on
from experiments.step.layout import Layout
from experiments.step.train_step import StepOnStored, TrainState

_LAUNCHES_AHEAD = 2


class Launch(NamedTuple):
    """Compiled steps.

    Attributes:
        compiled: the program.
        steps_at_once: largest number of steps of one call.
        run: `run(state, start, stop)` runs the steps from `start` to `stop` (exclusive), which are
            of one epoch and at most `steps_at_once`. It donates the state, and returns the next
            state and the losses, float32[steps_at_once], of which the first `stop - start` are set.
    """

    compiled: Any
    steps_at_once: int
    run: Callable[[TrainState, int, int], tuple[TrainState, jax.Array]]


class Feed(Protocol):
    """A split on its way to the devices."""

    examples: int

    def launch(
        self, step: StepOnStored, state: TrainState, batch_size: int, seed: int, epochs: int
    ) -> Launch:
        """Compiles the training step.

        Args:
            step: the training step on stored images.
            state: gives shapes, types and placement.
            batch_size: examples per step, at most `examples`.
            seed: seed of what the host draws.
            epochs: length of the run.
        """
        ...

    def batches(self, size: int) -> Iterator[tuple[Any, Any, np.ndarray]]:
        """Yields images, labels and which examples count; all batches have one size."""
        ...


def feed_of(part: Part, layout: Layout, steps_at_once: int) -> Feed:
    """Returns the feed of a part of a data set.

    Args:
        part: in memory or streamed.
        layout: layout of the batches over the devices.
        steps_at_once: length of the longest launch, for a part in memory.
    """
    made: Any = Streamed if part.streamed else InMemory
    return made(part, layout, steps_at_once)


class InMemory:
    """A split that is held whole on every device. See :class:`Feed`."""

    def __init__(self, split: Split, layout: Layout, steps_at_once: int) -> None:
        self.split, self.examples = layout.put(split), split.examples
        self._layout, self._steps_at_once = layout, steps_at_once

    def launch(
        self, step: StepOnStored, state: TrainState, batch_size: int, seed: int, epochs: int
    ) -> Launch:
        """See :class:`Feed`. The order of the examples depends on the key of the state."""
        layout, at_once = self._layout, self._steps_at_once
        steps_per_epoch = self.examples // batch_size
        steps = steps_on(step, self.examples, batch_size, at_once, layout.constrained)
        order_of = jax.jit(steps.order_of, out_shardings=layout.whole)
        number = np.int32(0)
        orders = {0: order_of(state, number)}
        with layout.context():
            lowered = layout.jit(steps.launch, state).lower(
                state, self.split, orders[0], number, number
            )
        compiled = lowered.compile()

        def run(state: TrainState, start: int, stop: int) -> tuple[TrainState, jax.Array]:
            epoch = start // steps_per_epoch
            if epoch not in orders:
                orders.clear()
                orders[epoch] = order_of(state, np.int32(epoch))
            return compiled(state, self.split, orders[epoch], np.int32(start), np.int32(stop))

        return Launch(compiled, at_once, run)

    def batches(self, size: int) -> Iterator[tuple[Any, Any, np.ndarray]]:
        """See :class:`Feed`."""
        parts = self._layout.parts
        size = min(size, -(-self.examples // parts) * parts)
        if self.examples < size:
            # Filled up, since devices share batches evenly.
            filled = Split(*(_padded(x, size, jnp.pad) for x in self.split))
            yield *filled, np.arange(size) < self.examples
            return
        for part, counted in windows(self.examples, size):
            images, labels = (jax.lax.slice_in_dim(x, part.start, part.stop) for x in self.split)
            yield images, labels, counted


class Streamed:
    """A split that is read and decoded batch by batch. See :class:`Feed`."""

    def __init__(self, stream: Stream, layout: Layout, _: int) -> None:
        self.examples, self._stream, self._layout = stream.examples, stream, layout

    def launch(
        self, step: StepOnStored, state: TrainState, batch_size: int, seed: int, epochs: int
    ) -> Launch:
        """See :class:`Feed`. A launch is one step; order and crops depend on the seed."""
        layout, image_shape = self._layout, self._stream.image_shape
        here = layout.rows_here(batch_size)
        streams: list[Iterator[Split]] = []

        def single(state: TrainState, batch: Split) -> tuple[TrainState, jax.Array]:
            state, loss = step(state, batch)
            return state, loss[None]

        def run(state: TrainState, start: int, stop: int) -> tuple[TrainState, jax.Array]:
            if not streams:
                streams.append(self._stream.training_batches(batch_size, seed, start, epochs, here))
            return compiled(state, layout.batch(next(streams[0]), batch_size))

        shapes = Split(
            jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8, sharding=layout.split),
            jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=layout.split),
        )
        with layout.context():
            compiled = layout.jit(single, state).lower(state, shapes).compile()
        return Launch(compiled, 1, run)

    def batches(self, size: int) -> Iterator[tuple[Any, Any, np.ndarray]]:
        """See :class:`Feed`."""
        here = self._layout.rows_here(size)
        for number, rows in enumerate(self._stream.batches(size, here)):
            filled = jax.tree.map(lambda x: _padded(x, len(here), np.pad), rows)
            counted = np.arange(size) < self.examples - number * size
            yield *self._layout.batch(filled, size), counted


def advance(
    launch: Launch,
    state: TrainState,
    start: int,
    stop: int,
    note: Callable[[list[float]], None],
    interrupted: Callable[[int], bool] = lambda step: False,
) -> tuple[TrainState, int]:
    """Launches the steps from `start` to `stop` (exclusive), of one epoch.

    Args:
        launch: the compiled steps.
        state: the state at step `start`; donated.
        start: number of the first step.
        stop: number of the step after the last.
        note: called with the losses of each launch when they are computed.
        interrupted: called before each launch with its first step; True stops there.

    Returns:
        The state, and the number of its step.
    """
    under_way: collections.deque[tuple[jax.Array, int]] = collections.deque()

    def note_next() -> None:
        losses, steps = under_way.popleft()
        note(np.asarray(losses)[:steps].tolist())

    while start < stop and not interrupted(start):
        end = min(stop, start + launch.steps_at_once)
        state, losses = launch.run(state, start, end)
        under_way.append((losses, end - start))
        start = end
        # The device never waits for the host, and a signal never waits for many launches.
        if len(under_way) > _LAUNCHES_AHEAD:
            note_next()
    while under_way:
        note_next()
    return state, start


def windows(examples: int, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields parts of one size that cover all examples, and which rows of each part are new."""
    size = min(size, examples)
    for first in range(0, examples, size):
        start = min(first, examples - size)
        yield slice(start, start + size), np.arange(start, start + size) >= first


def _padded(x: Any, size: int, pad: Callable) -> Any:
    """Fills up the first axis of `x` to `size` with zeros."""
    return pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
