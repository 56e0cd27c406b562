"""Every method through `value_and_grad` inside `shard_map` and `pmap`, as on one device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.test_front_door import (
    BATCH,
    PARAMS,
    by_hand,
    check,
    made,
    start,
    through_the_door,
    two_steps,
)


def replicated_but_the_batch(state, value, batch):
    """Returns `value` for every leaf of a state; sampa's batch is sharded like batches instead."""

    def spec(path, _):
        names = [getattr(key, "name", None) for key in path]
        return batch if "sampa_batch" in names else value

    return jax.tree_util.tree_map_with_path(spec, state)


def mesh_of_four():
    return jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])


def shard_mapped(name, check_vma, **options):
    mesh = mesh_of_four()
    specs = replicated_but_the_batch(start(name), P(), P("data"))
    step = jax.shard_map(
        made(name, axis_name="data", **options),
        mesh=mesh,
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), P(), specs),
        check_vma=check_vma,
    )
    return jax.jit(step)


def mapped(name, way, **options):
    if way != "pmap":
        return shard_mapped(name, way == "checked", **options)
    axes = replicated_but_the_batch(start(name), None, 0)
    step = jax.pmap(
        made(name, axis_name="data", **options),
        axis_name="data",
        in_axes=(None, axes, 0),
        out_axes=(None, None, axes),
        devices=jax.devices()[:4],
    )
    parted = functools.partial(jax.tree.map, lambda x: x.reshape(4, -1, *x.shape[1:]))
    whole = functools.partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))

    def at_the_batch(fn, state):
        return (
            state._replace(sampa_batch=fn(state.sampa_batch))
            if hasattr(state, "sampa_batch")
            else state
        )

    def on_whole(params, state, batch):
        value, grads, state = step(params, at_the_batch(parted, state), parted(batch))
        return value, grads, at_the_batch(whole, state)

    return on_whole


# One method of each kind: means of the batch, single examples, and both sorts of state.
SOME = ["bisam", "sparse fisher", "efficient", "friendly"]


def each_name_and_way(names, default):
    """Parametrizes: every method with varying-axis checks, and one in each way without them."""
    ways = [(name, "checked") for name in names]
    ways += [("bisam", "unchecked"), ("sparse fisher", "pmap")]
    return pytest.mark.parametrize(
        ("name", "way"),
        [pytest.param(*way, marks=[] if way in default else pytest.mark.slow) for way in ways],
    )


BY_DEFAULT = [*((name, "checked") for name in SOME[:3]), ("bisam", "unchecked")]


# The training step's tests have tilted on devices (tests/experiments/step/test_parallelism.py).
@each_name_and_way([*SOME, "sparse dynamic", "look", "sampa"], BY_DEFAULT)
def test_devices_give_the_numbers_of_one(name, way):
    check(two_steps(mapped(name, way), start(name)), by_hand(name))


@each_name_and_way([*SOME, "look"], [("sparse fisher", "checked")])
def test_groups_on_devices_give_the_numbers_of_one(name, way):
    expected = through_the_door(name, group_size=2)
    check(two_steps(mapped(name, way, group_size=2), start(name)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bisam", "efficient"])
def test_microbatches_on_devices_give_the_numbers_of_one(name):
    check(two_steps(mapped(name, "checked", microbatch_size=2), start(name)), by_hand(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam", "look", "efficient"])
def test_when_on_devices_gives_the_numbers_of_one(name):
    options = {"when": lambda step: step >= 3}
    step = made(name, axis_name="data", **options)
    mapped = jax.jit(
        jax.shard_map(
            lambda p, s, b, i: step(p, s, b, step=i),
            mesh=mesh_of_four(),
            in_specs=(P(), P(), P("data"), P()),
            out_specs=P(),
        )
    )
    one = jax.jit(made(name, **options))
    for i in (2, 3):
        got = mapped(PARAMS, start(name), BATCH, jnp.int32(i))
        want = one(PARAMS, start(name), BATCH, step=jnp.int32(i))
        check(([got[:2]], got[2]), ([want[:2]], want[2]))
