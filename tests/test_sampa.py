import contextlib
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bisam_jax import sampa
from tests.compiled import OPTIONS, quick_jit
from tests.problems import loss_of_batch, mlp_batch, mlp_params, perturbation_loss_of_batch
from tests.quadratic import C, W, descent, gradient, linear, quadratic, unit

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("bilevel", [False, True])
def test_sampa_on_a_quadratic(bilevel):
    shifts = np.array([[0.0, 0.0], [1.0, -1.0], [0.5, 2.0]])

    def batch_loss_fn(w, batch):
        return quadratic(w) + batch @ w

    def batch_q(w, batch):
        return linear(w) + batch[0] * jnp.sum(w**2)

    q = {"batch_perturbation_loss_fn": batch_q} if bilevel else {}
    rate, momentum, lam = 0.1, 0.9, 0.3
    tx = sampa(optax.sgd(rate, momentum=momentum), 0.2, lam, bilevel=bilevel)
    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    x, v, look, direction = W, np.zeros(2), np.zeros(2), np.zeros(2)
    for t, batch in enumerate(shifts):
        previous = shifts[max(t - 1, 0)]
        updates, state = tx.update(
            None,
            state,
            w,
            batch_loss_fn=batch_loss_fn,
            batch=jnp.asarray(batch),
            previous_batch=jnp.asarray(previous if t else shifts[2]),
            **q,
        )
        w = w + updates
        eps = 0.2 * unit(direction) if t else 0.0
        p = gradient(x + eps) + previous
        y = x - rate * (look + momentum * v) if t else x
        look = gradient(y) + batch
        direction = C + 2 * batch[0] * y if bilevel else look
        v = momentum * v + (1 - lam) * p + lam * look
        x = x - rate * v
        np.testing.assert_allclose(w, x, rtol=1e-12)


def test_sampa_with_interpolation_one_is_the_lookahead_optimizer():
    base = optax.sgd(0.1)
    tx = sampa(base, 0.5, 1.0)
    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    x, look = W, np.zeros(2)
    for t in range(4):
        updates, state = tx.update(
            None, state, w, batch_loss_fn=lambda w, _: quadratic(w), batch=0.0, previous_batch=0.0
        )
        w = w + updates
        look = gradient(x - 0.1 * look) if t else gradient(x)
        x = x - 0.1 * look
        np.testing.assert_allclose(w, x, rtol=1e-12)


def mesh_of(halves, size, kind=AxisType.Auto):
    devices = jax.devices()[: halves * size]
    return jax.make_mesh((halves, size), ("gradients", "data"), (kind, kind), devices=devices)


def noisy_loss(params, batch):
    """With a key an example, as dropout has."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, (4,)))(batch["key"])
    return loss_of_batch(params, {"x": batch["x"].astype(float) + noise, "y": batch["y"]})


def three_steps(bilevel, mesh, gradient_axis):
    params, rng = mlp_params(dtype=jnp.float64), jax.random.key(0)
    tx = sampa(optax.sgd(0.1, momentum=0.9), 0.3, 0.3, bilevel=bilevel, gradient_axis=gradient_axis)

    @quick_jit
    def step(params, state, batch, previous_batch):
        q = {"batch_perturbation_loss_fn": perturbation_loss_of_batch} if bilevel else {}
        batches = {"batch": batch, "previous_batch": previous_batch}
        updates, state = tx.update(None, state, params, batch_loss_fn=noisy_loss, **batches, **q)
        return optax.apply_updates(params, updates), state

    batches = [
        mlp_batch(seed) | {"key": jax.random.split(jax.random.fold_in(rng, seed), 16)}
        for seed in range(3)
    ]
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        batches = jax.device_put(batches, NamedSharding(mesh, P("data")))
        state = tx.init(params)
        for batch, previous in zip(batches, [batches[0], *batches], strict=False):
            params, state = step(params, state, batch, previous)
    return jax.device_get((params, state))


@functools.cache
def three_steps_one_after_the_other(bilevel):
    return three_steps(bilevel, mesh_of(1, 1), None)


@pytest.mark.parametrize("bilevel", [False, True])
@pytest.mark.parametrize("size", [1, 4])
def test_two_halves_give_the_same_numbers(bilevel, size):
    results = three_steps(bilevel, mesh_of(2, size), "gradients")
    expected = three_steps_one_after_the_other(bilevel)
    chex.assert_trees_all_close(results, expected, rtol=1e-9, atol=1e-12)


def program(mesh, gradient_axis):
    """Of a step that is all products of matrices."""
    params = {"w": jax.ShapeDtypeStruct((3, 64, 64), jnp.float32)}
    batch = jax.ShapeDtypeStruct((128, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    tx = sampa(optax.sgd(0.1), 0.3, gradient_axis=gradient_axis)

    def loss_fn(params, x):
        return jnp.square(x @ params["w"][0] @ params["w"][1] @ params["w"][2]).mean()

    def step(params, state, batch, previous_batch):
        batches = {"batch": batch, "previous_batch": previous_batch}
        return tx.update(None, state, params, batch_loss_fn=loss_fn, **batches)[0]

    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        return jax.jit(step).lower(params, state, batch, batch).compile(OPTIONS)


def test_each_half_computes_one_gradient():
    one, half = program(mesh_of(1, 1), None), program(mesh_of(2, 1), "gradients")
    ratio = half.cost_analysis()["flops"] / one.cost_analysis()["flops"]
    assert ratio == pytest.approx(0.5, abs=0.02)
    # What one half knows goes to the other once; points and batches are there already.
    collectives = re.findall(r"= .*? (all-\w+|collective-\w+|reduce-scatter)", half.as_text())
    assert set(collectives) == {"all-gather"}


def test_a_loss_on_one_half_need_not_know_of_it():
    def loss_fn(w, batch):
        return jax.lax.fori_loop(0, 2, lambda _, total: total + batch @ w, jnp.zeros([]))

    tx = sampa(optax.sgd(0.1), gradient_axis="gradients")
    update = jax.jit(functools.partial(tx.update, batch_loss_fn=loss_fn))
    with jax.set_mesh(mesh_of(2, 1)):
        update.trace(None, tx.init(W), jnp.asarray(W), batch=W, previous_batch=W)


@pytest.mark.parametrize(
    ("mesh", "got"),
    [
        (None, "'gradients' where the axes are none"),
        (lambda: mesh_of(1, 8), "'gradients': 'Auto of size 1'"),
        (lambda: mesh_of(2, 4, AxisType.Explicit), "'gradients': 'Explicit of size 2'"),
    ],
    ids=["none", "size", "type"],
)
def test_a_gradient_axis_that_does_not_fit(mesh, got):
    tx = sampa(optax.sgd(0.1), gradient_axis="gradients")
    batches = {"batch": 0.0, "previous_batch": 0.0}
    message = f"gradient_axis must be an Auto axis of size 2.*{got}.*jax.set_mesh"
    with contextlib.ExitStack() as context:
        if mesh:
            context.enter_context(jax.set_mesh(mesh()))
        with pytest.raises(ValueError, match=message):
            tx.update(None, tx.init(W), W, batch_loss_fn=lambda w, _: quadratic(w), **batches)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sampa(0.1), TypeError, "optimizer must be an optax transformation"),
        (lambda: sampa(optax.sgd(0.1), interpolation=2.0), ValueError, "interpolation must be"),
        (lambda: sampa(optax.sgd(0.1), gradient_axis=0), TypeError, "name of a mesh axis"),
        (lambda: descent(sampa(optax.sgd(0.1))), ValueError, "batch_loss_fn is missing"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
