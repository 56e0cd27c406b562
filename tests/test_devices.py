"""The same numbers on one device and on eight."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bisam_jax import bisam, l2_ball, sharpness_aware, value_and_grad
from tests.methods import METHODS
from tests.problems import (
    loss_of_batch,
    mlp_batch,
    mlp_params,
    perturbation_loss_of_batch,
)

PARAMS, BATCH = mlp_params(), mlp_batch(examples=32)
CLOSE = {"rtol": 2e-5, "atol": 1e-6}

# Through value_and_grad, which has no losses of single examples to give.
ON_BATCHES = {name: method for name, method in METHODS.items() if name != "efficient"}
each_method = pytest.mark.parametrize("method", ON_BATCHES.values(), ids=ON_BATCHES)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def step_of(tx, extra_args, **sizes):
    step = value_and_grad(tx, loss_of_batch, perturbation_loss_of_batch, **sizes)
    return lambda params, state, batch: step(params, state, batch, **extra_args)


def one_device(tx, extra_args=None, **sizes):
    step = jax.jit(step_of(tx, extra_args or {}, **sizes))
    return step(PARAMS, tx.init(PARAMS), BATCH)[1]


def per_device_reference(make, rho, extra_args=None):
    """Each eighth of the batch with a perturbation of its own, that is m-sharpness with m = 4."""
    return one_device(make(rho), extra_args, group_size=4)


def test_eight_devices_are_there():
    assert jax.device_count() == 8


@each_method
def test_jit_with_a_sharded_batch(method, mesh):
    tx = method.make(rho=0.3)
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    step = jax.jit(step_of(tx, method.extra_args))
    _, grads, _ = step(jax.device_put(PARAMS, NamedSharding(mesh, P())), tx.init(PARAMS), batch)
    chex.assert_trees_all_close(grads, one_device(tx, method.extra_args), **CLOSE)


@each_method
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_jit_with_sharded_parameters(method, explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    params = {"w": jnp.arange(48.0).reshape(16, 3) / 10, "b": jnp.ones(3)}
    x = jnp.sin(jnp.arange(64.0)).reshape(4, 16)

    def loss_fn(p):
        return jnp.mean(jnp.square(jnp.matmul(x, p["w"], out_sharding=None) + p["b"][None]))

    tx = method.make(rho=lambda count: 0.3)

    def step(params):
        grads, state = tx.update(
            jax.grad(loss_fn)(params),
            tx.init(params),
            params,
            loss_fn=loss_fn,
            **method.extra_args,
        )
        return grads, state

    expected, _ = jax.jit(step)(params)
    shardings = {"w": NamedSharding(mesh, P("model")), "b": NamedSharding(mesh, P())}
    with jax.set_mesh(mesh):
        grads, _ = jax.jit(step)(jax.device_put(params, shardings))
    chex.assert_trees_all_close(jax.device_get(grads), jax.device_get(expected), **CLOSE)
    if explicit:  # otherwise the compiler is free to choose
        assert grads["w"].sharding.is_equivalent_to(shardings["w"], 2)


@each_method
def test_pmap_with_a_perturbation_per_device(method):
    tx = method.make(rho=0.3)
    step = step_of(tx, method.extra_args)

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, None, 0))
    def pmapped(params, state, batch):
        _, grads, state = step(params, state, batch)
        return jax.lax.pmean(grads, "data"), state

    shards = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), BATCH)
    grads, _ = pmapped(PARAMS, tx.init(PARAMS), shards)
    expected = per_device_reference(method.make, 0.3, method.extra_args)
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

    shards = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), BATCH)
    grads = pmapped(PARAMS, tx.init(PARAMS), shards)
    chex.assert_trees_all_close(grads, one_device(bisam(0.3)), **CLOSE)


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
    mapped = jax.jit(jax.shard_map(per_device, mesh=mesh, **specs))
    state = tx.init(PARAMS)
    grads, new_state = mapped(PARAMS, state, BATCH)
    expected = one_device(bisam(0.3)) if synchronised else per_device_reference(bisam, 0.3)
    chex.assert_trees_all_close(grads, expected, **CLOSE)
    assert optax.tree.get(new_state, "radius_count") == 1


@pytest.mark.parametrize("group_size", [2, 4])
def test_groups_on_a_mesh_with_explicit_axes(group_size):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    tx = bisam(0.3)

    def with_aux(params, batch):
        return loss_of_batch(params, batch), batch["x"] * 2

    step = value_and_grad(tx, with_aux, has_aux=True, group_size=group_size)
    (_, aux), expected, _ = jax.jit(step)(PARAMS, tx.init(PARAMS), BATCH)
    with jax.set_mesh(mesh):
        batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
        (_, sharded_aux), grads, _ = jax.jit(step)(PARAMS, tx.init(PARAMS), batch)
    chex.assert_trees_all_close(jax.device_get(grads), jax.device_get(expected), **CLOSE)
    chex.assert_trees_all_close(jax.device_get(sharded_aux), jax.device_get(aux))


@pytest.mark.parametrize("sizes", [{"group_size": 4}, {"group_size": 2, "microbatch_size": 16}])
def test_groups_are_the_same_on_one_and_eight_devices(mesh, sizes):
    tx = bisam(0.3)
    expected = one_device(tx, **sizes)
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    step = jax.jit(value_and_grad(tx, loss_of_batch, perturbation_loss_of_batch, **sizes))
    _, grads, _ = step(jax.device_put(PARAMS, NamedSharding(mesh, P())), tx.init(PARAMS), batch)
    chex.assert_trees_all_close(grads, expected, **CLOSE)


@pytest.mark.parametrize("microbatch_size", [8, 16])
def test_microbatches_are_the_same_on_one_and_eight_devices(mesh, microbatch_size):
    tx = bisam(0.3)
    sizes = {"microbatch_size": microbatch_size}
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    step = jax.jit(value_and_grad(tx, loss_of_batch, perturbation_loss_of_batch, **sizes))
    _, grads, _ = step(jax.device_put(PARAMS, NamedSharding(mesh, P())), tx.init(PARAMS), batch)
    chex.assert_trees_all_close(grads, one_device(tx), **CLOSE)
