"""One device and eight give the same numbers, however the devices are used."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bisam_jax
from bisam_jax import fisher_scores, logits_loss, value_and_grad
from tests.methods import METHODS
from tests.problems import (
    loss_of_batch,
    losses_of_batch,
    mlp_batch,
    mlp_params,
    perturbation_losses_of_batch,
)

PARAMS, BATCH = mlp_params(), mlp_batch(examples=32)
SHARDS = jax.tree.map(lambda x: np.reshape(x, (8, 4, *x.shape[1:])), BATCH)
CLOSE = {"rtol": 2e-5, "atol": 1e-6}
BISAM = bisam_jax.bisam(0.3)
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS, scope="module")
each_check = pytest.mark.parametrize("check_vma", [False, True], ids=["unchecked", "checked"])


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


def test_eight_devices_are_there():
    assert jax.device_count() == 8


# What a method does with gradients alone is the same for all of these.
SHARDED = ("bisam", "sparse fisher", "sparse dynamic", "tilted", "efficient", "look", "functional")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_jit_with_a_sharded_batch(name):
    tx, mesh = METHODS[name].make(rho=0.3), mesh_of()
    step = jax.jit(value_and_grad(tx, losses_of_batch, perturbation_losses_of_batch))
    expected = step(PARAMS, tx.init(PARAMS), BATCH)[:2]
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    chex.assert_trees_all_close(step(params, tx.init(params), batch)[:2], expected, **CLOSE)


WIDE = {"w": jnp.asarray(np.arange(48.0).reshape(16, 3) / 10, jnp.float32), "b": jnp.ones(3)}
X = np.sin(np.arange(64.0, dtype=np.float32)).reshape(4, 16)


def outputs_of_wide(params):
    return jnp.matmul(X, params["w"], out_sharding=None) + params["b"][None]


@functools.cache
def step_of_wide(method):
    tx = method.make(rho=lambda count: 0.3)
    loss_fn = logits_loss(outputs_of_wide, lambda outputs: jnp.mean(jnp.square(outputs)))

    def example_losses_fn(params, indices):
        losses = jnp.square(outputs_of_wide(params)).mean(1)
        return losses if indices is None else losses[indices]

    @jax.jit
    def step(params):
        given = {"fisher_scores_fn": lambda p: p, "example_losses_fn": example_losses_fn}
        losses = {"loss_fn": loss_fn, "perturbation_loss_fn": loss_fn}
        return tx.update(None, tx.init(params), params, **losses, **given)

    return step, step(WIDE)[0]


# Types on a mesh with explicit axes are tested for every method in test_collectives.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind"),
    [(METHODS[name], AxisType.Auto) for name in SHARDED]
    + [(METHODS[name], AxisType.Explicit) for name in ("bisam", "asam", "sparse dynamic")],
)
def test_jit_with_sharded_parameters(method, kind):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    step, expected = step_of_wide(method)
    shardings = {"w": NamedSharding(mesh, P("model")), "b": NamedSharding(mesh, P())}
    with jax.set_mesh(mesh):
        grads, _ = step(jax.device_put(WIDE, shardings))
    chex.assert_trees_all_close(jax.device_get(grads), jax.device_get(expected), **CLOSE)
    if kind == AxisType.Explicit:  # otherwise the compiler is free to choose
        assert grads["w"].sharding.is_equivalent_to(shardings["w"], 2)


def one_device(tx=BISAM, **sizes):
    step = value_and_grad(tx, losses_of_batch, perturbation_losses_of_batch, **sizes)
    return jax.jit(step)(PARAMS, tx.init(PARAMS), BATCH)[1]


def pmean(updates, params=None):
    return jax.lax.pmean(updates, "data")


# Without axis_name, a step sees only the examples of its device.
SYNCHRONISED = bisam_jax.sharpness_aware(
    optax.chain(optax.stateless(pmean), bisam_jax.l2_ball(0.3))
)
PER_DEVICE = {
    "own perturbations": (BISAM, {"group_size": 4}),
    "a synchronised ball": (SYNCHRONISED, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("tx", "sizes"), PER_DEVICE.values(), ids=PER_DEVICE)
@pytest.mark.parametrize("way", ["pmap", "shard_map"])
def test_a_step_per_device(tx, sizes, way):
    step = value_and_grad(tx, losses_of_batch, perturbation_losses_of_batch)

    def per_device(params, batch):
        return pmean(step(params, tx.init(params), batch)[1])

    if way == "pmap":
        grads = jax.pmap(per_device, "data", in_axes=(None, 0), out_axes=None)(PARAMS, SHARDS)
    else:
        specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": False}
        mapped = jax.shard_map(per_device, mesh=mesh_of(), **specs)
        grads = jax.jit(mapped)(PARAMS, BATCH)
    chex.assert_trees_all_close(grads, one_device(**sizes), **CLOSE)


@pytest.mark.slow
def test_vmap_over_an_axis_with_a_name_is_one_step_too():
    step = value_and_grad(BISAM, losses_of_batch, perturbation_losses_of_batch, axis_name="data")
    mapped = jax.vmap(step, (None, None, 0), axis_name="data")
    _, grads, _ = jax.jit(mapped)(PARAMS, BISAM.init(PARAMS), SHARDS)
    expected = one_device()
    for device in range(8):
        own = jax.tree.map(lambda g, device=device: g[device], grads)
        chex.assert_trees_all_close(own, expected, **CLOSE)


@each_check
def test_aux_on_devices(check_vma):
    """Examples stay on their devices, and means are over all devices."""

    def with_aux(params, batch):
        losses = losses_of_batch(params, batch)
        return losses, {"losses": losses, "mean": losses.mean(), "x mean": batch["x"].mean(0)}

    step = value_and_grad(bisam_jax.sam(0.3), with_aux, has_aux=True, axis_name="data")

    def aux_of(params, batch):
        return step(params, bisam_jax.sam(0.3).init(params), batch)[0][1]

    specs = {"losses": P("data"), "mean": P(), "x mean": P()}
    mapped = jax.shard_map(
        aux_of,
        mesh=mesh_of(),
        in_specs=(P(), P("data")),
        out_specs=specs,
        check_vma=check_vma,
    )
    aux, expected = jax.jit(mapped)(PARAMS, BATCH), with_aux(PARAMS, BATCH)[1]
    chex.assert_trees_all_close(aux, expected, **CLOSE)


@pytest.mark.slow
def test_a_batch_with_keys_on_devices():
    """Each example has its key, as for dropout, and the chosen examples keep theirs."""
    tx = bisam_jax.efficient_sam(0.3, gamma=0.5)

    def noisy(params, batch):
        noise = jax.vmap(jax.random.normal)(batch["key"])
        return losses_of_batch(params, batch) + noise * params["hidden"]["b"].sum()

    batch = BATCH | {"key": jax.random.split(jax.random.key(3), 32)}
    whole = jax.jit(value_and_grad(tx, noisy))(PARAMS, tx.init(PARAMS), batch)
    step = value_and_grad(tx, noisy, axis_name="data")
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
    mapped = jax.jit(jax.shard_map(step, mesh=mesh_of(), **specs))
    parts = mapped(PARAMS, tx.init(PARAMS), batch)
    chex.assert_trees_all_close(parts[:2], whole[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_fisher_scores_under_shard_map():
    def sums(params, batch):
        return jax.lax.psum(fisher_scores(loss_of_batch, params, batch), "data")

    expected = jax.jit(functools.partial(fisher_scores, loss_of_batch))(PARAMS, BATCH)
    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": False}
    scores = jax.jit(jax.shard_map(sums, mesh=mesh_of(), **specs))(PARAMS, BATCH)
    chex.assert_trees_all_close(scores, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [2, 4])
def test_groups_on_a_mesh_with_explicit_axes(group_size):
    tx = bisam_jax.sam(0.3)

    def with_aux(params, batch):
        return losses_of_batch(params, batch), batch["x"] * 2

    step = jax.jit(value_and_grad(tx, with_aux, has_aux=True, group_size=group_size))
    (_, aux), expected, _ = step(PARAMS, tx.init(PARAMS), BATCH)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        batch = jax.device_put(BATCH, P("data"))
        (_, sharded_aux), grads, _ = step(PARAMS, tx.init(PARAMS), batch)
    chex.assert_trees_all_close(jax.device_get(grads), jax.device_get(expected), **CLOSE)
    chex.assert_trees_all_close(jax.device_get(sharded_aux), jax.device_get(aux))
