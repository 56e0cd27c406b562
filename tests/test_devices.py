"""The same numbers on one device and on eight."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bisam_jax import bisam, l2_ball, sharpness_aware, value_and_grad
from tests.compiled import quick_jit
from tests.methods import METHODS
from tests.problems import (
    loss_of_batch,
    mlp_batch,
    mlp_params,
    perturbation_loss_of_batch,
)

PARAMS, BATCH = mlp_params(), mlp_batch(examples=32)
SHARDS = jax.tree.map(lambda x: np.reshape(x, (8, 4, *x.shape[1:])), BATCH)
CLOSE = {"rtol": 2e-5, "atol": 1e-6}

# Through value_and_grad, which has no losses of single examples to give.
ON_BATCHES = {name: method for name, method in METHODS.items() if name != "efficient"}
each_method = pytest.mark.parametrize("method", ON_BATCHES.values(), ids=ON_BATCHES, scope="module")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


BISAM = METHODS["bisam"]


def step_of(method, **sizes):
    tx = method.make(rho=0.3)
    step = value_and_grad(tx, loss_of_batch, perturbation_loss_of_batch, **sizes)
    return lambda params, state, batch: step(params, state, batch, **method.extra_args)


@functools.cache
def start(method):
    return method.make(rho=0.3).init(PARAMS)


@functools.cache
def jitted(method, **sizes):
    return quick_jit(step_of(method, **sizes))


@functools.cache
def one_device(method, **sizes):
    return jitted(method, **sizes)(PARAMS, start(method), BATCH)[1]


def eight_devices(mesh, method, **sizes):
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    return jitted(method, **sizes)(params, start(method), batch)[1]


def per_device_reference(method):
    """Each eighth of the batch with a perturbation of its own, that is m-sharpness with m = 4."""
    return one_device(method, group_size=4)


def test_eight_devices_are_there():
    assert jax.device_count() == 8


@each_method
def test_jit_with_a_sharded_batch(method, mesh):
    chex.assert_trees_all_close(eight_devices(mesh, method), one_device(method), **CLOSE)


WIDE = {"w": jnp.asarray(np.arange(48.0).reshape(16, 3) / 10, jnp.float32), "b": jnp.ones(3)}
X = np.sin(np.arange(64.0, dtype=np.float32)).reshape(4, 16)


@functools.cache
def step_of_wide(method):
    def loss_fn(p):
        return jnp.mean(jnp.square(jnp.matmul(X, p["w"], out_sharding=None) + p["b"][None]))

    tx = method.make(rho=lambda count: 0.3)

    @quick_jit
    def step(params):
        grads, state = jax.grad(loss_fn)(params), tx.init(params)
        return tx.update(grads, state, params, loss_fn=loss_fn, **method.extra_args)

    return step, step(WIDE)[0]


@each_method
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_jit_with_sharded_parameters(method, explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    step, expected = step_of_wide(method)
    shardings = {"w": NamedSharding(mesh, P("model")), "b": NamedSharding(mesh, P())}
    with jax.set_mesh(mesh):
        grads, _ = step(jax.device_put(WIDE, shardings))
    chex.assert_trees_all_close(jax.device_get(grads), jax.device_get(expected), **CLOSE)
    if explicit:  # otherwise the compiler is free to choose
        assert grads["w"].sharding.is_equivalent_to(shardings["w"], 2)


@each_method
def test_pmap_with_a_perturbation_per_device(method):
    step = step_of(method)

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, None, 0))
    def pmapped(params, state, batch):
        _, grads, state = step(params, state, batch)
        return jax.lax.pmean(grads, "data"), state

    grads, _ = pmapped(PARAMS, start(method), SHARDS)
    expected = per_device_reference(method)
    for device in range(8):
        one = jax.tree.map(lambda g, device=device: g[device], grads)
        chex.assert_trees_all_close(one, expected, **CLOSE)


def pmean(updates, params=None):
    return jax.lax.pmean(updates, "data")


def test_pmap_with_a_synchronised_perturbation():
    tx = sharpness_aware(optax.chain(optax.stateless(pmean), l2_ball(0.3)))
    step = value_and_grad(tx, loss_of_batch, perturbation_loss_of_batch)

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, None, 0), out_axes=None)
    def pmapped(params, state, batch):
        return jax.lax.pmean(step(params, state, batch)[1], "data")

    grads = pmapped(PARAMS, tx.init(PARAMS), SHARDS)
    chex.assert_trees_all_close(grads, one_device(BISAM), **CLOSE)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("synchronised", [False, True])
def test_shard_map(mesh, synchronised, check_vma):
    ball = l2_ball(lambda count: 0.3)
    tx = sharpness_aware(optax.chain(optax.stateless(pmean), ball) if synchronised else ball)
    step = value_and_grad(tx, loss_of_batch, perturbation_loss_of_batch)

    def per_device(params, state, batch):
        if check_vma:
            # Under the checks the gradient of replicated parameters is summed over the mesh.
            params = jax.lax.pcast(params, "data", to="varying")
        _, grads, state = step(params, state, batch)
        return jax.lax.pmean(grads, "data"), state

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": check_vma}
    mapped = quick_jit(jax.shard_map(per_device, mesh=mesh, **specs))
    state = tx.init(PARAMS)
    grads, new_state = mapped(PARAMS, state, BATCH)
    expected = one_device(BISAM) if synchronised else per_device_reference(BISAM)
    chex.assert_trees_all_close(grads, expected, **CLOSE)
    assert optax.tree.get(new_state, "radius_count") == 1


@pytest.mark.parametrize("group_size", [2, 4])
def test_groups_on_a_mesh_with_explicit_axes(group_size):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    tx = bisam(0.3)

    def with_aux(params, batch):
        return loss_of_batch(params, batch), batch["x"] * 2

    step = value_and_grad(tx, with_aux, has_aux=True, group_size=group_size)
    step = quick_jit(step)
    (_, aux), expected, _ = step(PARAMS, tx.init(PARAMS), BATCH)
    with jax.set_mesh(mesh):
        batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
        (_, sharded_aux), grads, _ = step(PARAMS, tx.init(PARAMS), batch)
    chex.assert_trees_all_close(jax.device_get(grads), jax.device_get(expected), **CLOSE)
    chex.assert_trees_all_close(jax.device_get(sharded_aux), jax.device_get(aux))


@pytest.mark.parametrize("sizes", [{"group_size": 4}, {"group_size": 2, "microbatch_size": 16}])
def test_groups_are_the_same_on_one_and_eight_devices(mesh, sizes):
    expected = one_device(BISAM, **sizes)
    chex.assert_trees_all_close(eight_devices(mesh, BISAM, **sizes), expected, **CLOSE)


@pytest.mark.parametrize("microbatch_size", [8, 16])
def test_microbatches_are_the_same_on_one_and_eight_devices(mesh, microbatch_size):
    grads = eight_devices(mesh, BISAM, microbatch_size=microbatch_size)
    chex.assert_trees_all_close(grads, one_device(BISAM), **CLOSE)
