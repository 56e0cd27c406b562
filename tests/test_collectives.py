"""What devices say to each other and hold, from the compiled program."""

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
from bisam_jax import perturbation_loss, value_and_grad
from tests.compiled import OPTIONS, quick_jit
from tests.methods import METHODS, Method


def collectives(program):
    """The kind of each collective, and the sizes of the arrays that it gives."""
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


def losses_of(params, batch):
    logits = logits_of(params, batch["x"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def loss_fn(params, batch):
    return losses_of(params, batch).mean()


def perturbation_loss_fn(params, batch):
    return perturbation_loss(logits_of(params, batch["x"]), batch["y"]).mean()


PARAMS = [jax.ShapeDtypeStruct((16, width), jnp.float32) for width in (16, 16, 16, 4)]
BATCH = {
    "x": jax.ShapeDtypeStruct((64, 16), jnp.float32),
    "y": jax.ShapeDtypeStruct((64,), jnp.int32),
}
GRADIENT = sorted(math.prod(w.shape) for w in PARAMS)
ONE_GRADIENT = [("all-reduce", GRADIENT)]


def plain_step(params, state, batch):
    return descended(params, jax.grad(loss_fn)(params, batch)), state


def descended(params, grads):
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def step_of(method, q=perturbation_loss_fn, **sizes):
    step = value_and_grad(method.make(0.1), loss_fn, q, **sizes)

    def sharp_step(params, state, batch):
        noise = jax.tree.map(lambda w: jnp.stack([w, -w]), params)
        losses = functools.partial(examples_losses, batch)
        args = {"noise": noise, "example_losses_fn": losses} | method.extra_args
        _, grads, state = step(params, state, batch, **args)
        return descended(params, grads), state

    return sharp_step


def examples_losses(batch, params, indices):
    part = batch if indices is None else jax.tree.map(lambda x: x[indices], batch)
    return losses_of(params, part)


@functools.cache
def compiled(step, method=None, devices=8):
    """A step on a batch over the devices, with parameters on all of them."""
    mesh = mesh_of(devices)
    state = jax.eval_shape(method.make(0.1).init, PARAMS) if method else ()
    args = (
        laid_out(PARAMS, mesh, P()),
        laid_out(state, mesh, P()),
        laid_out(BATCH, mesh, P("data")),
    )
    out = NamedSharding(mesh, P())
    return jax.jit(step, out_shardings=out).lower(*args).compile(OPTIONS)


SAM, BISAM = METHODS["sam"], METHODS["bisam"]


def test_a_plain_step_sends_one_gradient():
    assert collectives(compiled(plain_step)) == ONE_GRADIENT


@pytest.mark.parametrize(("method", "q"), [(SAM, None), (BISAM, perturbation_loss_fn)])
def test_a_synchronised_perturbation_sends_one_more(method, q):
    assert collectives(compiled(step_of(method, q), method)) == 2 * ONE_GRADIENT


@pytest.mark.parametrize("group_size", [8, 4])
def test_groups_that_fit_a_device_send_what_a_plain_step_sends(group_size):
    assert collectives(compiled(step_of(BISAM, group_size=group_size), BISAM)) == ONE_GRADIENT


@pytest.mark.parametrize("check_vma", [False, True])
def test_a_perturbation_per_device_sends_what_a_plain_step_sends(check_vma):
    mesh = mesh_of(8)
    step = value_and_grad(BISAM.make(0.1), loss_fn, perturbation_loss_fn)

    def per_device(params, state, batch):
        varying = jax.lax.pcast(params, "data", to="varying")
        grads = jax.lax.pmean(step(varying, state, batch)[1], "data")
        return descended(params, grads), state

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": check_vma}
    program = compiled(jax.shard_map(per_device, mesh=mesh, **specs), BISAM)
    assert collectives(program) == ONE_GRADIENT


def sampa_step(params, state, batch):
    batches = {"batch": batch, "previous_batch": batch}
    updates, state = SAMPA.make(0.1).update(None, state, params, batch_loss_fn=loss_fn, **batches)
    return optax.apply_updates(params, updates), state


SAMPA = Method(lambda rho: bisam_jax.sampa(optax.sgd(0.1), rho))
TILTED = Method(lambda rho: bisam_jax.tilted_sam(rho, num_samples=2))
EFFICIENT = Method(lambda rho: bisam_jax.efficient_sam(rho, gamma=0.5))
# The most gradients that a step may send; XLA may find ways to send less.
SENT = {
    "asam": (METHODS["asam"], 2),
    "gsam": (METHODS["gsam"], 3),
    "bilateral": (METHODS["bilateral"], 4),
    "friendly": (METHODS["friendly"], 2),
    "sparse fisher": (METHODS["sparse fisher"], 2),
    "sparse dynamic": (METHODS["sparse dynamic"], 2),
    "tilted": (TILTED, 4),
    "efficient": (EFFICIENT, 2),
    "sampa": (SAMPA, 2),
    "bisam": (BISAM, 2),
}


@pytest.mark.parametrize(("method", "gradients"), SENT.values(), ids=SENT)
def test_what_is_sent_does_not_grow_with_the_devices(method, gradients):
    step = sampa_step if method is SAMPA else step_of(method)
    two, eight = (numbers_sent(compiled(step, method, devices)) for devices in (2, 8))
    assert 0 < eight == two <= 1.01 * gradients * sum(GRADIENT)


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
    """Of the training step, and the arguments that it takes."""
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
        for tree in (params, quick_jit(tx.init)(params))
    )
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    out = jax.tree.map(lambda x: x.sharding, (params, state))
    args = params, state, batch
    program = jax.jit(step, out_shardings=out, donate_argnums=(0, 1)).lower(*args).compile(OPTIONS)
    return program, args


SHARDED = ["bisam", "gsam", "friendly", "sparse dynamic"]


@pytest.mark.parametrize("method", [METHODS[name] for name in SHARDED], ids=SHARDED)
def test_parameters_in_parts_stay_in_parts(method):
    (whole, whole_args), (parts, args) = (
        program_with_parts_of_the_parameters(method, devices) for devices in (1, 8)
    )
    memory, of_whole = parts.memory_analysis(), whole.memory_analysis()
    batch = sum(leaf.nbytes for leaf in jax.tree.leaves(args[2]))
    in_parts = (of_whole.argument_size_in_bytes - batch) / 8
    assert memory.argument_size_in_bytes == pytest.approx(in_parts + batch, rel=1e-3)
    # All parameters on one device would be as much as WIDE_SIZE.
    assert memory.temp_size_in_bytes < of_whole.temp_size_in_bytes / 8 + 0.1 * WIDE_SIZE
    assert max(max(sizes) for _, sizes in collectives(parts)) <= 256 * 256 / 8
    results = parts(*args), whole(*whole_args)
    chex.assert_trees_all_close(*map(jax.device_get, results), rtol=1e-4, atol=1e-5)


EXPLICIT = {name: method for name, method in METHODS.items() if name != "efficient"} | {
    "tilted": TILTED,
    "efficient": EFFICIENT,
}


@pytest.mark.parametrize("method", EXPLICIT.values(), ids=EXPLICIT)
def test_types_on_a_mesh_with_explicit_axes(method):
    """Traced alone: where the parameters lie is part of their types."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Explicit,) * 2)
    specs = {"w": P(None, "model"), "b": P("model")}
    params = {"w": jnp.ones((8, 16)), "b": jnp.ones(16)}
    tx, points = method.make(0.1), []

    def losses(params, batch):
        points.append(jax.tree.map(jax.typeof, params))
        return jnp.square(batch @ params["w"] + params["b"][None]).mean(1)

    def mean_loss(params, batch):
        return losses(params, batch).mean()

    def step(params, state, batch):
        def example_losses(params, indices):
            part = batch if indices is None else batch.at[indices].get(out_sharding=P("data"))
            return losses(params, part)

        args = {"example_losses_fn": example_losses} | method.extra_args
        _, grads, new_state = value_and_grad(tx, mean_loss, mean_loss)(params, state, batch, **args)
        old, new = (
            jax.tree.map(jax.typeof, tree) for tree in ((params, state), (grads, new_state))
        )
        assert old == new
        return grads, new_state

    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x, spec: jax.device_put(x, spec), params, specs)
        batch = jax.device_put(jnp.ones((16, 8)), P("data"))
        jax.jit(step).trace(params, quick_jit(tx.init)(params), batch)
        types = jax.tree.map(jax.typeof, params)
    assert len(points) >= 2
    assert all(point == types for point in points)
