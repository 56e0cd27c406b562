"""Communication and memory of devices, from the compiled program."""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bisam_jax
from bisam_jax import logits_loss, perturbation_loss, value_and_grad
from tests.methods import METHODS, UPDATING


def collectives(program):
    """Returns the kind of each collective, and the sizes of its output arrays."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    found = re.finditer(rf"= (.*?) ({kinds})(?:-start)?\(", program.as_text())
    return [(match[2], sorted(map(size, re.findall(r"\[([\d,]*)\]", match[1])))) for match in found]


def size(shape):
    return math.prod(map(int, filter(None, shape.split(","))))


def numbers_sent(program):
    return sum(sum(sizes) for _, sizes in collectives(program))


def mesh_of(devices, kind=AxisType.Auto):
    devices = jax.devices()[:devices]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(kind,), devices=devices)


def laid_out(tree, mesh, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def logits_of(params, x):
    *hidden, head = params
    for w in hidden:
        x = jnp.tanh(x @ w)
    return x @ head


def cross_entropy(logits, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


loss_fn = logits_loss(lambda params, batch: logits_of(params, batch["x"]), cross_entropy)


def perturbation_loss_fn(params, batch):
    return perturbation_loss(logits_of(params, batch["x"]), batch["y"])


PARAMS = [jax.ShapeDtypeStruct((16, width), jnp.float32) for width in (16, 16, 16, 4)]
BATCH = {
    "x": jax.ShapeDtypeStruct((64, 16), jnp.float32),
    "y": jax.ShapeDtypeStruct((64,), jnp.int32),
}
GRADIENT = sorted(math.prod(w.shape) for w in PARAMS)
ONE_GRADIENT = [("all-reduce", GRADIENT)]


def plain_step(params, state, batch):
    return descended(params, jax.grad(lambda p: loss_fn(p, batch).mean())(params)), state


def descended(params, grads):
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def step_of(method, q=perturbation_loss_fn, **options):
    step = value_and_grad(method.make(0.1), loss_fn, q, **options)

    def sharp_step(params, state, batch):
        _, grads, state = step(params, state, batch)
        if method.contains_optimizer:
            return optax.apply_updates(params, grads), state
        return descended(params, grads), state

    return sharp_step


@functools.cache
def compiled(step, method=None, devices=8):
    """Compiles a step on a batch sharded over the devices, with parameters on every device."""
    mesh = mesh_of(devices)
    state = jax.eval_shape(method.make(0.1).init, PARAMS) if method else ()
    if hasattr(state, "sampa_batch"):
        previous = laid_out(state.sampa_batch, mesh, P("data"))
        state = laid_out(state, mesh, P())._replace(sampa_batch=previous)
    else:
        state = laid_out(state, mesh, P())
    args = laid_out(PARAMS, mesh, P()), state, laid_out(BATCH, mesh, P("data"))
    out = jax.tree.map(lambda x: x.sharding, args[:2])
    return jax.jit(step, out_shardings=out).lower(*args).compile()


SAM, BISAM = METHODS["sam"], METHODS["bisam"]


def test_a_plain_step_sends_one_gradient():
    assert collectives(compiled(plain_step)) == ONE_GRADIENT


@pytest.mark.parametrize(("method", "q"), [(SAM, None), (BISAM, perturbation_loss_fn)])
def test_a_synchronised_perturbation_sends_one_more(method, q):
    assert collectives(compiled(step_of(method, q), method)) == 2 * ONE_GRADIENT


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [8, 4])
def test_groups_that_fit_a_device_send_what_a_plain_step_sends(group_size):
    assert collectives(compiled(step_of(BISAM, group_size=group_size), BISAM)) == ONE_GRADIENT


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize(
    ("options", "gradients"),
    [({"group_size": 4}, 1), ({}, 2), ({"microbatch_size": 4}, 2)],
    ids=str,
)
def test_shard_map_sends_no_more_than_one_program(options, gradients, check_vma):
    """With groups, a step sends what a plain step sends: one gradient."""
    step = step_of(BISAM, axis_name="data", **options)
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": check_vma}
    program = compiled(jax.shard_map(step, mesh=mesh_of(8), **specs), BISAM)
    assert collectives(program) == gradients * ONE_GRADIENT


SAMPA = dataclasses.replace(
    UPDATING["sampa, bilevel"],
    make=lambda rho: bisam_jax.sampa(optax.sgd(0.1), rho, batch_like=BATCH, bilevel=True),
)
# The most gradients that a step may send; XLA may find ways to send less. One method of each kind.
SENT = {
    "bisam": 2,
    "gsam": 3,
    "bilateral": 4,
    "sparse dynamic": 2,
    "efficient": 2,
    "look": 3,
    "sampa": 3,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gradients"), SENT.items(), ids=SENT)
def test_what_is_sent_does_not_grow_with_the_devices(name, gradients):
    method = SAMPA if name == "sampa" else METHODS[name]
    step = step_of(method)
    two, eight = (numbers_sent(compiled(step, method, devices)) for devices in (2, 8))
    # The losses of single examples and the value of the batch are also sent.
    more = 2 * 64 if method.examples else 8
    assert 0 < two <= gradients * sum(GRADIENT) + more
    assert eight == pytest.approx(two, abs=more)


WIDE = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 4
WIDE_SIZE = 4 * 4 * 256 * 256


def with_momentum(method):
    tx = optax.chain(method.make(0.1), optax.sgd(0.1, momentum=0.9))
    step = value_and_grad(tx, loss_fn, perturbation_loss_fn)

    def train_step(params, state, batch):
        _, updates, state = step(params, state, batch)
        return optax.apply_updates(params, updates), state

    return tx, train_step


def program_with_parts_of_the_parameters(method, devices):
    """Returns the program of the training step, and its arguments."""
    mesh = jax.make_mesh(
        (1, devices), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=jax.devices()[:devices]
    )
    tx, step = with_momentum(method)

    def lay(leaf):
        return NamedSharding(mesh, P("fsdp") if leaf.ndim == 2 else P())

    rng = np.random.default_rng(0)
    params = [rng.normal(size=w.shape).astype(np.float32) / 16 for w in WIDE]
    batch = {"x": rng.normal(size=(16, 256)).astype(np.float32), "y": np.arange(16)}
    params, state = (
        jax.tree.map(lambda x: jax.device_put(x, lay(x)), tree)
        for tree in (params, jax.jit(tx.init)(params))
    )
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    out = jax.tree.map(lambda x: x.sharding, (params, state))
    args = params, state, batch
    program = jax.jit(step, out_shardings=out, donate_argnums=(0, 1)).lower(*args).compile()
    return program, args


SHARDED = ["bisam", "gsam", "friendly", "sparse dynamic"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHODS[name] for name in SHARDED], ids=SHARDED)
def test_parameters_in_parts_stay_in_parts(method):
    (whole, whole_args), (parts, args) = (
        program_with_parts_of_the_parameters(method, devices) for devices in (1, 8)
    )
    memory, of_whole = parts.memory_analysis(), whole.memory_analysis()
    batch = sum(leaf.nbytes for leaf in jax.tree.leaves(args[2]))
    in_parts = (of_whole.argument_size_in_bytes - batch) / 8
    assert memory.argument_size_in_bytes == pytest.approx(in_parts + batch, rel=1e-3)
    # All parameters on one device would take WIDE_SIZE.
    assert memory.temp_size_in_bytes < of_whole.temp_size_in_bytes / 8 + 0.1 * WIDE_SIZE
    assert max(max(sizes) for _, sizes in collectives(parts)) <= 256 * 256 / 8
    results = parts(*args), whole(*whole_args)
    chex.assert_trees_all_close(*map(jax.device_get, results), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_types_on_a_mesh_with_explicit_axes(method):
    """Only traced: the sharding of the parameters is part of their types."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Explicit,) * 2)
    specs = {"w": P(None, "model"), "b": P("model")}
    params = {"w": jnp.ones((8, 16)), "b": jnp.ones(16)}
    tx, points = method.make(0.1), []

    def logits(params, batch):
        points.append(jax.tree.map(jax.typeof, params))
        return batch @ params["w"] + params["b"][None]

    losses = logits_loss(logits, lambda logits, batch: jnp.square(logits).mean(1))
    # The user shards a gradient per example.
    scores = {"fisher_scores_fn": lambda params: params}

    def step(params, state, batch):
        _, grads, new_state = value_and_grad(tx, losses, losses)(params, state, batch, **scores)
        old, new = (
            jax.tree.map(jax.typeof, tree) for tree in ((params, state), (grads, new_state))
        )
        assert old == new
        return grads, new_state

    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x, spec: jax.device_put(x, spec), params, specs)
        batch = jax.device_put(jnp.ones((16, 8)), P("data"))
        jax.jit(step).trace(params, jax.jit(tx.init)(params), batch)
        types = jax.tree.map(jax.typeof, params)
    assert len(points) >= 2
    assert all(point == types for point in points)


def test_microbatches_on_a_mesh_with_explicit_axes_are_refused():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    step = value_and_grad(bisam_jax.sam(0.1), loss_fn, microbatch_size=8)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), PARAMS)
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), BATCH)
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, P("data"))
        message = r"microbatch_size cannot split batch\['x'\].*explicit mesh axis 'data'.*axis_name"
        with pytest.raises(ValueError, match=message):
            jax.jit(step).trace(params, bisam_jax.sam(0.1).init(params), batch)
