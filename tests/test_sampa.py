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

from bisam_jax import adaptive_l2_ball, sampa, value_and_grad
from tests.problems import loss_of_batch, mlp_batch, mlp_params, perturbation_loss_of_batch
from tests.quadratic import (
    C,
    W,
    adaptive_eps,
    assert_takes_one_ball,
    descent,
    gradient,
    linear,
    quadratic,
    unit,
)

pytestmark = pytest.mark.usefixtures("float64")


SHIFTS = np.array([[0.0, 0.0], [1.0, -1.0], [0.5, 2.0]])
RATE, MOMENTUM, INTERPOLATION = 0.1, 0.9, 0.3


def shifted_loss(w, batch):
    return quadratic(w) + batch @ w


def shifted_q(w, batch):
    return linear(w) + batch[0] * jnp.sum(w**2)


def by_hand(eps, bilevel):
    """Returns the weights after each step."""
    x, v, look, direction = W, np.zeros(2), np.zeros(2), None
    for t, batch in enumerate(SHIFTS):
        previous = SHIFTS[max(t - 1, 0)]
        p = gradient(x + (eps(direction, x) if t else 0.0)) + previous
        y = x - RATE * (look + MOMENTUM * v) if t else x
        look = gradient(y) + batch
        direction = C + 2 * batch[0] * y if bilevel else look
        v = MOMENTUM * v + (1 - INTERPOLATION) * p + INTERPOLATION * look
        x = x - RATE * v
        yield x


@pytest.mark.parametrize(
    ("ball", "eps"),
    [
        ({"rho": 0.2}, lambda a, w: 0.2 * unit(a)),
        ({"perturbation": adaptive_l2_ball(0.3, eta=0.1)}, adaptive_eps),
    ],
    ids=["ball", "adaptive ball"],
)
@pytest.mark.parametrize("bilevel", [False, True], ids=["sam", "bisam"])
@pytest.mark.parametrize("grads", [None, np.full(2, np.nan)], ids=["no grads", "grads"])
def test_sampa_on_a_quadratic(ball, eps, bilevel, grads):
    q = {"batch_perturbation_loss_fn": shifted_q} if bilevel else {}
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)
    like = jax.ShapeDtypeStruct((2,), jnp.float64)
    tx = sampa(optimizer, **ball, interpolation=INTERPOLATION, batch_like=like, bilevel=bilevel)
    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    for batch, expected in zip(SHIFTS, by_hand(eps, bilevel), strict=True):
        updates, state = tx.update(
            grads, state, w, batch_loss_fn=shifted_loss, batch=jnp.asarray(batch), **q
        )
        w = w + updates
        np.testing.assert_allclose(w, expected, rtol=1e-12)
        np.testing.assert_array_equal(state.sampa_batch, batch)


@pytest.mark.parametrize("bilevel", [False, True], ids=["sam", "bisam"])
def test_sampa_through_value_and_grad(bilevel):
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)
    tx = sampa(optimizer, 0.2, INTERPOLATION, batch_like=SHIFTS[:1], bilevel=bilevel)

    def losses(fn):
        return lambda w, batch: jax.vmap(lambda shift: fn(w, shift))(batch)

    q = losses(shifted_q) if bilevel else None
    step = jax.jit(value_and_grad(tx, losses(shifted_loss), q))
    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    trajectory = by_hand(lambda a, w: 0.2 * unit(a), bilevel)
    for batch, expected in zip(SHIFTS, trajectory, strict=True):
        value, updates, state = step(w, state, jnp.asarray(batch[None]))
        clean = shifted_q if bilevel else shifted_loss
        np.testing.assert_allclose(value, clean(w, jnp.asarray(batch)), rtol=1e-12)
        w = w + updates
        np.testing.assert_allclose(w, expected, rtol=1e-12)


def test_sampa_with_interpolation_one_is_the_lookahead_optimizer():
    base = optax.sgd(0.1)
    tx = sampa(base, 0.5, 1.0, batch_like=0.0)
    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    x, look = W, np.zeros(2)
    for t in range(4):
        updates, state = tx.update(
            None, state, w, batch_loss_fn=lambda w, _: quadratic(w), batch=0.0
        )
        w = w + updates
        look = gradient(x - 0.1 * look) if t else gradient(x)
        x = x - 0.1 * look
        np.testing.assert_allclose(w, x, rtol=1e-12)


def test_extra_args_reach_the_perturbation():
    def update_fn(updates, state, params=None, *, temperature, **extra_args):
        return jax.tree.map(lambda g: temperature * g, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    tx = sampa(optax.sgd(RATE), interpolation=0.0, batch_like=W, perturbation=scaled)
    w, state = jnp.asarray(W), tx.init(W)
    for _ in range(2):
        before = w
        updates, state = tx.update(
            None, state, w, batch_loss_fn=shifted_loss, batch=jnp.zeros(2), temperature=0.5
        )
        w = w + updates
    expected = before - RATE * gradient(before + 0.5 * gradient(W))
    np.testing.assert_allclose(w, expected, rtol=1e-12)


def mesh_of(halves, size, kind=AxisType.Auto):
    devices = jax.devices()[: halves * size]
    return jax.make_mesh((halves, size), ("gradients", "data"), (kind, kind), devices=devices)


def noisy_loss(params, batch):
    """Uses one key per example, as dropout does."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, (4,)))(batch["key"])
    return loss_of_batch(params, {"x": batch["x"].astype(float) + noise, "y": batch["y"]})


def three_steps(bilevel, mesh, gradient_axis):
    params, rng = mlp_params(dtype=jnp.float64), jax.random.key(0)
    batches = [
        mlp_batch(seed) | {"key": jax.random.split(jax.random.fold_in(rng, seed), 16)}
        for seed in range(3)
    ]
    tx = sampa(
        optax.sgd(0.1, momentum=0.9),
        0.3,
        0.3,
        batch_like=batches[0],
        bilevel=bilevel,
        gradient_axis=gradient_axis,
    )

    @jax.jit
    def step(params, state, batch):
        q = {"batch_perturbation_loss_fn": perturbation_loss_of_batch} if bilevel else {}
        updates, state = tx.update(None, state, params, batch_loss_fn=noisy_loss, batch=batch, **q)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        batches = jax.device_put(batches, NamedSharding(mesh, P("data")))
        state = tx.init(params)
        laid_out = jax.device_put(state.sampa_batch, NamedSharding(mesh, P("data")))
        state = state._replace(sampa_batch=laid_out)
        for batch in batches:
            params, state = step(params, state, batch)
    keys = jax.random.key_data(state.sampa_batch.pop("key"))
    return jax.device_get((params, state, keys))


@functools.cache
def three_steps_one_after_the_other(bilevel):
    return three_steps(bilevel, mesh_of(1, 1), None)


@pytest.mark.parametrize(
    ("bilevel", "size"),
    [(True, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 1), (True, 4)))],
)
def test_two_halves_give_the_same_numbers(bilevel, size):
    results = three_steps(bilevel, mesh_of(2, size), "gradients")
    expected = three_steps_one_after_the_other(bilevel)
    chex.assert_trees_all_close(results, expected, rtol=1e-9, atol=1e-12)


def program(mesh, gradient_axis):
    """Returns the program of a step that consists of matrix products."""
    params = {"w": jax.ShapeDtypeStruct((3, 64, 64), jnp.float32)}
    batch = jax.ShapeDtypeStruct((128, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    tx = sampa(optax.sgd(0.1), 0.3, batch_like=batch, gradient_axis=gradient_axis)

    def loss_fn(params, x):
        return jnp.square(x @ params["w"][0] @ params["w"][1] @ params["w"][2]).mean()

    def step(params, state, batch):
        return tx.update(None, state, params, batch_loss_fn=loss_fn, batch=batch)[0]

    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)._replace(sampa_batch=batch)
        return jax.jit(step).lower(params, state, batch).compile()


@pytest.mark.slow
def test_each_half_computes_one_gradient():
    one, half = program(mesh_of(1, 1), None), program(mesh_of(2, 1), "gradients")
    ratio = half.cost_analysis()["flops"] / one.cost_analysis()["flops"]
    assert ratio == pytest.approx(0.5, abs=0.02)
    # Each half sends its result to the other half once. Points and batches are not sent.
    collectives = re.findall(r"= .*? (all-\w+|collective-\w+|reduce-scatter)", half.as_text())
    assert set(collectives) == {"all-gather"}


def test_a_loss_on_one_half_need_not_know_of_it():
    def loss_fn(w, batch):
        return jax.lax.fori_loop(0, 2, lambda _, total: total + batch @ w, jnp.zeros([]))

    tx = sampa(optax.sgd(0.1), batch_like=W, gradient_axis="gradients")
    update = jax.jit(functools.partial(tx.update, batch_loss_fn=loss_fn))
    with jax.set_mesh(mesh_of(2, 1)):
        update.trace(None, tx.init(W), jnp.asarray(W), batch=W)


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
    tx = sampa(optax.sgd(0.1), batch_like=0.0, gradient_axis="gradients")
    message = f"gradient_axis must be an Auto axis of size 2.*{got}.*jax.set_mesh"
    with contextlib.ExitStack() as context:
        if mesh:
            context.enter_context(jax.set_mesh(mesh()))
        with pytest.raises(ValueError, match=message):
            tx.update(None, tx.init(W), W, batch_loss_fn=lambda w, _: quadratic(w), batch=0.0)


SAMPA = sampa(optax.sgd(0.1), batch_like=W)
BILEVEL = sampa(optax.sgd(0.1), batch_like=W, bilevel=True)
COMPLETE = {"loss_fn": None, "batch_loss_fn": shifted_loss, "batch": W}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sampa(0.1, batch_like=W), TypeError, "optimizer must be an optax transformation"),
        (
            lambda: sampa(optax.sgd(0.1), interpolation=2.0, batch_like=W),
            ValueError,
            "interpolation must be",
        ),
        (
            lambda: sampa(optax.sgd(0.1), batch_like=W, gradient_axis=0),
            TypeError,
            "name of a mesh axis",
        ),
        (lambda: sampa(optax.sgd(0.1)), TypeError, "batch_like"),
        (lambda: descent(SAMPA), ValueError, "batch_loss_fn is missing"),
        (lambda: descent(SAMPA, **COMPLETE | {"batch": None}), ValueError, "batch is missing"),
        (
            lambda: descent(SAMPA, **COMPLETE | {"batch": np.ones(3)}),
            ValueError,
            r"batch must match the batch_like .* float\d+\[2\], got float\d+\[3\]",
        ),
        (
            lambda: descent(BILEVEL, **COMPLETE),
            ValueError,
            r"batch_perturbation_loss_fn is missing, and sampa\(bilevel=True\) ascends it",
        ),
        (
            lambda: descent(SAMPA, **COMPLETE, batch_perturbation_loss_fn=shifted_q),
            ValueError,
            r"make it with sampa\(..., bilevel=True\)",
        ),
        (
            lambda: descent(SAMPA, **COMPLETE, perturbation_loss_fn=linear),
            ValueError,
            r"make it with sampa\(..., bilevel=True\)",
        ),
        (
            lambda: descent(SAMPA, **COMPLETE, perturbation_grads=C),
            ValueError,
            r"make it with sampa\(..., bilevel=True\)",
        ),
        (
            lambda: descent(SAMPA, **COMPLETE | {"batch_loss_fn": lambda w, batch: w}),
            TypeError,
            "batch_loss_fn must return one real floating scalar",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_ball():
    assert_takes_one_ball(functools.partial(sampa, optax.sgd(0.1), batch_like=W))


def test_the_state_does_not_share_its_batch_with_the_caller():
    batch = jnp.asarray(W)
    _, state = SAMPA.update(None, SAMPA.init(W), W, **COMPLETE | {"batch": batch})
    assert state.sampa_batch is not batch
    jax.jit(lambda state: state, donate_argnums=0)(state)
    assert not batch.is_deleted()
