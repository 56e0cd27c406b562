"""Launches: the order and the randomness of their steps, from any first step."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.config.config import Config, Place
from experiments.config.recipe import resolve
from experiments.step import train_step
from experiments.step.feeds import InMemory, advance, windows
from experiments.step.layout import layout_of

LAYOUT = layout_of(resolve(Config()), Place(devices=1))
SPLIT = data.Split(np.zeros((40, 2, 2, 1), np.uint8), np.arange(40, dtype=np.int32))


class Seen(NamedTuple):
    """Stands for a training state: counts steps, and sums what the step saw."""

    step: Any
    key: Any
    params: Any


def start(seed=0):
    return Seen(jnp.int32(0), jax.random.key(seed), jnp.float32(0))


def step(state, batch):
    """The loss tells which examples came, in which order, with which key."""
    loss = batch.labels.astype(jnp.float32) @ (1.0 + jnp.arange(len(batch.labels)))
    loss += batch.images.astype(jnp.float32).sum()
    return state._replace(step=state.step + 1, params=state.params * 0.5 + loss), loss


def noise(key, images):
    return jax.random.randint(key, images.shape, 0, 256, jnp.uint8)


def launch_of(steps_at_once, step=step, batch_size=8, seed=0):
    def step_on_stored(state, stored):
        return step(state, train_step.prepared(stored, noise, state))

    feed = InMemory(SPLIT, LAYOUT, steps_at_once)
    return feed.launch(step_on_stored, start(seed), batch_size, seed, 2)


def test_every_step_draws_its_own_augmentation():
    first, again, second = (
        train_step.prepared(SPLIT, noise, start()._replace(step=jnp.int32(number))).images
        for number in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()


def run(launch, state, start, stop):
    losses = []
    state, reached = advance(launch, state, start, stop, losses.extend)
    assert reached == stop
    return state, losses


def epochs(launch, state, number=2, steps=5):
    losses = []
    for epoch in range(number):
        state, new = run(launch, state, epoch * steps, (epoch + 1) * steps)
        losses += new
    return state, losses


def test_the_length_of_launches_changes_nothing():
    results = [epochs(launch_of(length), start()) for length in (1, 3, 100)]
    for result in results[1:]:
        assert result[1] == results[0][1]
        chex.assert_trees_all_equal(result[0], results[0][0])
    assert len(set(results[0][1])) == 10


@pytest.mark.parametrize("steps_at_once", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_resumes_from_any_step(steps_at_once):
    launch = launch_of(steps_at_once)
    state, losses = epochs(launch, start())
    for middle in (4, 7):
        epoch_end = 5 if middle < 5 else 10
        before = epochs(launch, start(), middle // 5)[0]
        before, _ = run(launch, before, middle // 5 * 5, middle)
        resumed, rest = run(launch_of(steps_at_once), before, middle, epoch_end)
        assert rest == losses[middle:epoch_end]
        if epoch_end == 10:
            chex.assert_trees_all_equal(resumed, state)


def test_every_epoch_has_each_example_once_in_its_own_order():
    def labels(state, batch):
        return state._replace(step=state.step + 1), batch.labels[0].astype(jnp.float32)

    orders = {}
    for seed in (0, 1):
        _, losses = epochs(launch_of(3, labels, 1, seed), start(seed), 2, 40)
        orders[seed, 0], orders[seed, 1] = losses[:40], losses[40:]
    assert all(sorted(order) == list(range(40)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4


def test_the_incomplete_last_batch_is_dropped():
    _, losses = epochs(launch_of(9, batch_size=16), start(), 1, 2)
    assert len(losses) == 2


@pytest.mark.parametrize("size", [3, 4, 10, 50])
def test_windows_cover_each_example_once(size):
    seen = []
    for part, counted in windows(10, size):
        assert part.stop - part.start == len(counted) == min(size, 10)
        seen += np.arange(part.start, part.stop)[counted].tolist()
    assert seen == list(range(10))


def test_an_interruption_is_the_last_launch():
    asked = []

    def interrupted(step):
        asked.append(step)
        return len(asked) > 3

    noted = []
    state, reached = advance(launch_of(1), start(), 0, 5, noted.append, interrupted)
    assert reached == state.step == 3
    assert asked == [0, 1, 2, 3]
    assert [len(losses) for losses in noted] == [1, 1, 1]


@pytest.mark.parametrize("steps_at_once", [1, 3])
def test_one_compilation(steps_at_once):
    traced = []

    def counting(state, batch):
        traced.append(None)
        return step(state, batch)

    launch = launch_of(steps_at_once, step=counting)
    state, _ = epochs(launch, start())
    run(launch, state, 10, 11)
    assert len(traced) == 1
