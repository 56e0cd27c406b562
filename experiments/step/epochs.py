"""The steps of an epoch on a split in memory, as pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.data import Split
from experiments.step.train_step import StepOnStored, TrainState, keys_of


class Steps(NamedTuple):
    """The steps of a run on a split in memory, as pure functions.

    Attributes:
        order_of: maps state and epoch to the examples of its steps, int32[steps, batch]. Every
            epoch has its own order, without the incomplete last batch.
        launch: maps state, split, order, first step and last step (exclusive, in the same epoch)
            to the next state and the losses, float32[steps_at_once].
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
    """Returns the steps on a split of `examples`.

    Args:
        step: the training step on stored images.
        examples: number of examples.
        batch_size: examples per step, at most `examples`.
        steps_at_once: length of the longest launch. If it is 1, the program has no loop.
        constrained: lays a batch over the devices.
    """
    steps_per_epoch = examples // batch_size

    def order_of(state: TrainState, epoch: jax.Array) -> jax.Array:
        key = jax.random.fold_in(keys_of(state).order, epoch)
        permutation = jax.random.permutation(key, examples)
        return permutation[: steps_per_epoch * batch_size].reshape(steps_per_epoch, batch_size)

    def one(state: TrainState, data: Split, order: jax.Array, number: jax.Array) -> tuple:
        # Each device gathers only its own rows.
        indices = constrained(order[number % steps_per_epoch])
        # The number is the same for all replicas, so `when` is decided once for all of them.
        state = state._replace(step=number)
        return step(state, constrained(jax.tree.map(lambda x: x[indices], data)))

    def single(state: TrainState, data: Split, order: jax.Array, start: Any, _: Any) -> tuple:
        state, loss = one(state, data, order, start)
        return state, loss[None]

    # With traced limits, launches of every length share one compiled program.
    def several(state: TrainState, data: Split, order: jax.Array, start: Any, stop: Any) -> tuple:
        def body(number: jax.Array, carry: tuple) -> tuple:
            state, losses = carry
            state, loss = one(state, data, order, number)
            return state, losses.at[number - start].set(loss)

        losses = jnp.zeros(steps_at_once, jnp.float32)
        return jax.lax.fori_loop(start, stop, body, (state, losses))

    return Steps(order_of, single if steps_at_once == 1 else several)
