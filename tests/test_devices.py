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

import bisam_jax
from bisam_jax import fisher_scores, value_and_grad
from tests.compiled import quick_jit
from tests.methods import METHODS, Method
from tests.problems import (
    loss_of_batch,
    mlp_batch,
    mlp_logits,
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


def args_of_batch(method):
    return ARGS_OF.get(method, lambda batch: method.extra_args)


def step_of(method, **sizes):
    tx = method.make(rho=0.3)
    step = value_and_grad(tx, loss_of_batch, perturbation_loss_of_batch, **sizes)
    args_of = args_of_batch(method)
    return lambda params, state, batch: step(params, state, batch, **args_of(batch))


@functools.cache
def start(method):
    return method.make(rho=0.3).init(PARAMS)


@functools.cache
def jitted(method, **sizes):
    return quick_jit(step_of(method, **sizes))


@functools.cache
def one_device_step(method, **sizes):
    return jitted(method, **sizes)(PARAMS, start(method), BATCH)


def one_device(method, **sizes):
    return one_device_step(method, **sizes)[1]


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


SYNCHRONISED = Method(
    lambda rho: bisam_jax.sharpness_aware(
        optax.chain(optax.stateless(pmean), bisam_jax.l2_ball(rho))
    )
)


def test_pmap_with_a_synchronised_perturbation():
    step = step_of(SYNCHRONISED)

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, None, 0), out_axes=None)
    def pmapped(params, state, batch):
        return jax.lax.pmean(step(params, state, batch)[1], "data")

    grads = pmapped(PARAMS, start(SYNCHRONISED), SHARDS)
    chex.assert_trees_all_close(grads, one_device(BISAM), **CLOSE)


def fisher_args(batch, mean=lambda tree: tree, enter=lambda params: params):
    scores = functools.partial(fisher_scores, loss_of_batch, microbatch_size=2)
    return {"fisher_scores_fn": lambda params: mean(scores(enter(params), batch))}


def efficient_args(batch, join=lambda losses: losses, enter=lambda params: params):
    def losses(params, indices):
        logits = mlp_logits(enter(params), batch["x"])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return join(losses) if indices is None else join(losses)[indices]

    return {"example_losses_fn": losses}


NOISE = jax.tree.map(lambda p: jnp.stack([0.1 * jnp.sin(p), 0.1 * jnp.cos(p)]), PARAMS)
FISHER = Method(bisam_jax.sparse_sam_fisher)
EFFICIENT = Method(lambda rho: bisam_jax.efficient_sam(rho, beta=0.5, gamma=0.5))
ARGS_OF = {FISHER: fisher_args, EFFICIENT: efficient_args}
# With more than METHODS has; bilevel SAM is SAM here.
ON_SHARDS = {name: method for name, method in METHODS.items() if name != "sam"} | {
    "sparse fisher": FISHER,
    "efficient": EFFICIENT,
    "tilted": Method(
        lambda rho: bisam_jax.tilted_sam(rho, num_samples=2), extra_args={"noise": NOISE}
    ),
}
each_method_on_shards = pytest.mark.parametrize(
    "method", ON_SHARDS.values(), ids=ON_SHARDS, scope="module"
)
each_check = pytest.mark.parametrize("check_vma", [False, True], ids=["unchecked", "checked"])


def varying(tree):
    """Otherwise, under the checks, the gradient of replicated parameters is summed over a mesh."""
    return jax.lax.pcast(tree, "data", to="varying")


@jax.custom_vjp
def with_mean_gradient(params):
    """Does where nothing is checked what the checks do: the gradient of a mean is a mean."""
    return params


with_mean_gradient.defvjp(lambda params: (params, None), lambda _, grads: (pmean(grads),))


def follows_gradients(leaf):
    """Counters and keys are the same on all devices, running means and masks may not be."""
    return leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.floating)


def on_shards(mesh, check_vma, fn, state=()):
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": check_vma}
    return quick_jit(jax.shard_map(fn, mesh=mesh, **specs))(PARAMS, state, BATCH)


def per_device_step(method, args_of=None, **sizes):
    """Each device's own perturbation, and the mean of their gradients."""
    tx, args_of = method.make(rho=0.3), args_of or args_of_batch(method)
    step = value_and_grad(tx, loss_of_batch, perturbation_loss_of_batch, **sizes)

    def per_device(params, state, batch):
        state = jax.tree.map(lambda x: varying(x) if follows_gradients(x) else x, state)
        return pmean(step(varying(params), state, batch, **args_of(batch))[1])

    return per_device


def synchronised_step(method, check_vma):
    """Losses are means over the devices, and so are all gradients: one perturbation."""
    enter, to = (varying, "invarying") if check_vma else (with_mean_gradient, "varying")
    join = functools.partial(jax.lax.all_gather, axis_name="data", tiled=True, to=to)
    losses = (
        lambda params, batch, fn=fn: pmean(fn(enter(params), batch))
        for fn in (loss_of_batch, perturbation_loss_of_batch)
    )
    step = value_and_grad(method.make(rho=0.3), *losses)

    def per_device(params, state, batch):
        args = method.extra_args
        if method is FISHER:
            args = fisher_args(batch, pmean, varying)
        if method is EFFICIENT:
            args = efficient_args(batch, join, enter)
        return step(params, state, batch, **args)[1:]

    return per_device


@functools.cache
def of_each_shard(method, args_of):
    """The reference where extra args are made from a shard, which groups do not do."""
    step = value_and_grad(method.make(rho=0.3), loss_of_batch, perturbation_loss_of_batch)
    each = jax.vmap(lambda shard: step(PARAMS, start(method), shard, **args_of(shard))[1])
    return jax.tree.map(lambda grads: grads.mean(0), quick_jit(each)(SHARDS))


@each_method_on_shards
@each_check
def test_shard_map_with_a_perturbation_per_device(method, mesh, check_vma):
    grads = on_shards(mesh, check_vma, per_device_step(method), start(method))
    reference = functools.partial(of_each_shard, args_of=ARGS_OF.get(method))
    expected = (reference if method in ARGS_OF else per_device_reference)(method)
    chex.assert_trees_all_close(grads, expected, **CLOSE)


@each_method_on_shards
@each_check
def test_shard_map_with_a_synchronised_perturbation(method, mesh, check_vma):
    step = synchronised_step(method, check_vma)
    grads, state = on_shards(mesh, check_vma, step, start(method))
    _, expected, expected_state = one_device_step(method)
    chex.assert_trees_all_close(grads, expected, **CLOSE)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected_state)
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        if follows_gradients(leaf):
            np.testing.assert_allclose(leaf, like, **CLOSE)
        else:
            assert (leaf == like).all()


@pytest.mark.parametrize("sizes", [{"group_size": 2}, {"microbatch_size": 2}])
def test_shard_map_with_groups_and_microbatches(mesh, sizes):
    grads = on_shards(mesh, True, per_device_step(BISAM, **sizes), start(BISAM))
    expected = one_device(BISAM, group_size=sizes.get("group_size", 4))
    chex.assert_trees_all_close(grads, expected, **CLOSE)


def test_shard_map_with_a_synchronised_ball(mesh):
    step = per_device_step(SYNCHRONISED)
    grads = on_shards(mesh, True, step, start(SYNCHRONISED))
    chex.assert_trees_all_close(grads, one_device(BISAM), **CLOSE)


def test_shard_map_with_one_fisher_mask_and_a_perturbation_per_device(mesh):
    step = per_device_step(FISHER, lambda batch: fisher_args(batch, pmean))
    grads = on_shards(mesh, True, step, start(FISHER))
    expected = of_each_shard(FISHER, lambda shard: fisher_args(BATCH))
    chex.assert_trees_all_close(grads, expected, **CLOSE)


@each_check
def test_fisher_scores_under_shard_map(mesh, check_vma):
    def sums(params, state, batch):
        return jax.lax.psum(fisher_scores(loss_of_batch, varying(params), batch), "data")

    expected = quick_jit(functools.partial(fisher_scores, loss_of_batch))(PARAMS, BATCH)
    chex.assert_trees_all_close(on_shards(mesh, check_vma, sums), expected, **CLOSE)


@pytest.mark.parametrize("group_size", [2, 4])
def test_groups_on_a_mesh_with_explicit_axes(group_size):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    tx = bisam_jax.bisam(0.3)

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
