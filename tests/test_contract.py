"""What every method must do: one table, one set of tests."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.methods import METHODS, TAKING_GRAD_FN, largest_weights
from tests.problems import (
    loss_of_batch,
    mlp_batch,
    mlp_params,
    perturbation_loss_of_batch,
)

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_taking_grad_fn = pytest.mark.parametrize("method", TAKING_GRAD_FN.values(), ids=TAKING_GRAD_FN)

PARAMS, BATCH = mlp_params(), mlp_batch()


def loss_fn(params):
    return loss_of_batch(params, BATCH)


def perturbation_loss_fn(params):
    return perturbation_loss_of_batch(params, BATCH)


GRADS = jax.grad(loss_fn)(PARAMS)


def update(tx, state=None, params=PARAMS, grads=GRADS, **extra_args):
    defaults = {"loss_fn": loss_fn, "fisher_scores_fn": largest_weights}
    extra_args = defaults | extra_args
    # The whole batch as one example, for the method that asks for examples.
    extra_args["example_losses_fn"] = lambda p, indices: extra_args["loss_fn"](p)[None]
    return tx.update(grads, tx.init(params) if state is None else state, params, **extra_args)


@each_method
def test_zero_radius_is_the_base_optimizer(method):
    tx = method.make(rho=0.0)
    for extra_args in ({}, {"perturbation_loss_fn": perturbation_loss_fn}):
        grads, _ = jax.jit(lambda extra_args=extra_args: update(tx, **extra_args))()
        chex.assert_trees_all_close(grads, GRADS, rtol=1e-5, atol=1e-7)


@each_taking_grad_fn
def test_zero_gradient_is_the_plain_step(method):
    zeros = optax.tree.zeros_like(PARAMS)
    grads, _ = update(method.make(rho=0.1), grads=zeros, clean_grad_fn=lambda: GRADS)
    chex.assert_trees_all_close(grads, GRADS, rtol=1e-5, atol=1e-7)


@each_method
def test_radius_matters(method):
    small, large = (update(method.make(rho=rho))[0] for rho in (0.05, 0.5))
    for grads in (small, large):
        assert optax.tree.norm(optax.tree.sub(grads, GRADS)) > 1e-3
    assert optax.tree.norm(optax.tree.sub(small, large)) > 1e-3


@each_method
def test_perturbation_loss_is_what_is_ascended(method):
    tx = method.make(rho=0.5)
    with_q, _ = update(tx, perturbation_loss_fn=perturbation_loss_fn)
    with_grad_q, _ = update(
        tx,
        grads=jax.grad(perturbation_loss_fn)(PARAMS),
        clean_grad_fn=lambda: GRADS,
        ascent_loss_fn=perturbation_loss_fn,
    )
    with_l, _ = update(tx)
    chex.assert_trees_all_close(with_q, with_grad_q, rtol=1e-5, atol=1e-6)
    assert optax.tree.norm(optax.tree.sub(with_q, with_l)) > 1e-3


@each_taking_grad_fn
def test_grad_fn_equals_loss_fn(method):
    tx = method.make(rho=0.1)
    by_loss, _ = update(tx)
    by_grad, _ = update(tx, loss_fn=None, grad_fn=jax.grad(loss_fn))
    chex.assert_trees_all_close(by_grad, by_loss)


@each_method
def test_functions_are_called_once(method):
    calls = {"loss": 0, "perturbation": 0}

    def counted_loss(params):
        calls["loss"] += 1
        return loss_fn(params)

    def counted_perturbation_loss(params):
        calls["perturbation"] += 1
        return perturbation_loss_fn(params)

    update(method.make(rho=0.1), loss_fn=counted_loss)
    assert calls == {"loss": method.loss_calls, "perturbation": 0}
    calls["loss"] = 0
    update(
        method.make(rho=0.1),
        loss_fn=counted_loss,
        perturbation_loss_fn=counted_perturbation_loss,
    )
    at_the_start = 1 if method.ascends_loss_fn else 0
    assert calls == {"loss": method.loss_calls - at_the_start, "perturbation": 1}


@each_method
@pytest.mark.usefixtures("standard_promotion")
def test_unknown_extra_args_are_accepted_everywhere(method):
    """Alone, in a chain, under inject_hyperparams, with reduce_on_plateau after it."""
    expected, _ = update(method.make(rho=0.1))
    alone, _ = update(method.make(rho=0.1), unknown=1, value=2.0)
    injected, _ = update(optax.inject_hyperparams(method.make)(rho=0.1), unknown=1)
    chex.assert_trees_all_close(alone, expected)
    chex.assert_trees_all_close(injected, expected, rtol=1e-6)
    tx = optax.chain(
        method.make(rho=0.1), optax.scale(2.0), optax.contrib.reduce_on_plateau(patience=2)
    )
    chained, state = update(tx, unknown=1, value=2.0)
    _, state = update(tx, state, value=3.0)
    chex.assert_trees_all_close(chained, optax.tree.scale(2.0, expected), rtol=1e-6)
    assert optax.tree.get(state, "plateau_count") == 1


@each_method
def test_state_keeps_its_type_and_nothing_recompiles(method):
    for rho in (0.1, optax.linear_schedule(0.1, 0.2, 10)):
        tx = method.make(rho=rho)
        step = jax.jit(lambda params, state, tx=tx: update(tx, state, params))
        state = tx.init(PARAMS)
        for _ in range(3):
            _, new_state = step(PARAMS, state)
            chex.assert_trees_all_equal_structs(state, new_state)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
            for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True):
                assert jax.typeof(old) == jax.typeof(new)
                assert old.sharding == new.sharding
            state = new_state
        assert step._cache_size() == 1


@each_method
def test_init_is_abstract(method):
    for rho in (0.1, lambda count: 0.1):
        tx = method.make(rho=rho)
        expected = jax.eval_shape(tx.init, PARAMS)
        structs = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
        chex.assert_trees_all_equal_structs(tx.init(PARAMS), expected, tx.init(structs))
        narrow = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), PARAMS)
        chex.assert_trees_all_equal_structs(tx.init(narrow), expected)


@each_method
def test_params_and_state_can_be_donated(method):
    tx = optax.chain(method.make(rho=lambda count: 0.1), optax.sgd(0.1, momentum=0.9))

    def step(params, state):
        updates, state = update(tx, state, params)
        return optax.apply_updates(params, updates), state

    expected = jax.jit(step)(PARAMS, tx.init(PARAMS))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    donated = jax.jit(step, donate_argnums=(0, 1))(params, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))
    chex.assert_trees_all_close(donated[0], expected[0])


@each_method
def test_size_of_the_state(method):
    weights = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    state = jax.tree.leaves(method.make(rho=0.1).init(PARAMS))
    size = sum(leaf.nbytes for leaf in state)
    assert 0 <= size - method.state_bytes * weights <= 16


@each_method
def test_vmap_over_rho(method):
    rhos = jnp.array([0.0, 0.1, 0.5])
    together = jax.vmap(lambda rho: update(method.make(rho=rho))[0])(rhos)
    for i, rho in enumerate(rhos):
        alone, _ = update(method.make(rho=float(rho)))
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        chex.assert_trees_all_close(one, alone, rtol=1e-5, atol=1e-6)


@each_method
def test_vmap_over_seeds(method):
    tx = method.make(rho=lambda count: 0.1)
    stacked = jax.vmap(lambda seed: mlp_params_of(seed))(jnp.arange(3))
    states = jax.vmap(tx.init)(stacked)
    grads = jax.vmap(jax.grad(loss_fn))(stacked)
    together, _ = jax.vmap(lambda g, s, p: update(tx, s, p, g))(grads, states, stacked)
    for seed in range(3):
        params = mlp_params_of(seed)
        alone, _ = update(tx, params=params, grads=jax.grad(loss_fn)(params))
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together)
        chex.assert_trees_all_close(one, alone, rtol=1e-5, atol=1e-6)


def mlp_params_of(seed):
    return jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(9), seed), p.shape),
        PARAMS,
    )


@each_method
def test_scan_equals_a_loop(method):
    tx = optax.chain(method.make(rho=lambda count: 0.1), optax.sgd(0.1))

    def step(carry, _):
        params, state = carry
        updates, state = update(tx, state, params, jax.grad(loss_fn)(params))
        return (optax.apply_updates(params, updates), state), None

    start = (PARAMS, tx.init(PARAMS))
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=4))(start)
    looped = start
    for _ in range(4):
        looped, _ = step(looped, None)
    chex.assert_trees_all_close(scanned[0], looped[0], rtol=1e-4, atol=1e-5)


@each_method
@pytest.mark.usefixtures("float64")
def test_grad_through_the_step_and_remat(method):
    tx, params = method.make(rho=0.1), mlp_params(dtype=jnp.float64)
    direction = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)

    def loss_after_a_step(t, fn):
        point = jax.tree.map(lambda p, d: p + t * d, params, direction)
        grads, _ = update(tx, params=point, grads=jax.grad(fn)(point), loss_fn=fn)
        return fn(jax.tree.map(lambda p, g: p - 0.1 * g, point, grads))

    slope = jax.grad(loss_after_a_step)(0.0, loss_fn)
    ahead, behind = (loss_after_a_step(t, loss_fn) for t in (1e-5, -1e-5))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)
    remat = jax.grad(loss_after_a_step)(0.0, jax.checkpoint(loss_fn))
    np.testing.assert_allclose(remat, slope, rtol=1e-12)


@each_taking_grad_fn
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_are_perturbed_in_float32(method, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    grads = jax.tree.map(lambda g: g.astype(dtype), jax.grad(loss_fn)(wide))
    points = []

    def grad_fn(point):
        points.append(point)
        return jax.grad(loss_fn)(point)

    rho = 1e-3
    tx = method.make(rho=lambda count: rho)
    state = tx.init(params)
    got, new_state = update(tx, state, params, grads, loss_fn=None, grad_fn=grad_fn)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    chex.assert_trees_all_equal_dtypes(got, params)
    chex.assert_trees_all_equal_dtypes(points[0], wide)
    reference = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    expected, _ = update(method.make(rho=rho), params=wide, grads=reference)
    chex.assert_trees_all_close(got, jax.tree.map(lambda g: g.astype(dtype), expected), rtol=1e-2)


@each_method
def test_structures_and_leaves_that_are_not_floating(method):
    params = {
        "tuple": (PARAMS["hidden"]["w"], None),
        "scalar": jnp.float32(2.0),
        "python": 1.5,
        "empty": jnp.zeros((0, 2)),
        "integer": jnp.array([3]),
        "key": jax.random.key(0),
    }

    def fn(p):
        assert jnp.issubdtype(p["integer"].dtype, jnp.integer)
        norm = jnp.sum(p["tuple"][0] ** 2) + p["scalar"] ** 2 + p["python"] ** 4
        return norm * p["integer"][0].astype(jnp.float32) + jax.random.uniform(p["key"])

    grads = jax.grad(fn, allow_int=True)(params)
    tx = method.make(rho=0.1)
    every = {"loss_fn": fn, "example_losses_fn": lambda p, indices: fn(p)[None]}
    every |= method.extra_args
    new, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p, **every))(grads, params)
    chex.assert_trees_all_equal_structs(new, grads)
    assert new["integer"].dtype == jax.dtypes.float0
    assert jnp.isfinite(new["scalar"])
    assert jnp.isfinite(new["python"])
    assert new["tuple"][1] is None
    assert new["empty"].shape == (0, 2)


@each_method
def test_masked_around_it_says_what_to_do(method):
    mask = {"hidden": True, "head": False}
    with pytest.raises(ValueError, match=r"freeze the others before the ball"):
        optax.masked(method.make(rho=0.1), mask).init(PARAMS)


@each_method
def test_masked_inside_and_after_it_works(method):
    mask = {"hidden": True, "head": False}
    tx = optax.chain(method.make(rho=0.1), optax.masked(optax.set_to_zero(), mask))
    updates, _ = update(tx)
    expected, _ = update(method.make(rho=0.1))
    assert optax.tree.norm(updates["hidden"]) == 0
    chex.assert_trees_all_close(updates["head"], expected["head"])


@each_method
def test_map_params(method):
    tx = optax.chain(method.make(rho=0.1), optax.trace(0.9))
    state = tx.init(PARAMS)
    ones = optax.tree.map_params(tx, jnp.ones_like, state)
    chex.assert_trees_all_equal(ones[1].trace, jax.tree.map(jnp.ones_like, PARAMS))
    chex.assert_trees_all_equal_structs(ones[0], state[0])


@each_taking_grad_fn
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": None}, ValueError, "params is missing"),
        ({"loss_fn": None}, ValueError, "exactly one of loss_fn .* got neither"),
        ({"grad_fn": jax.grad(loss_fn)}, ValueError, "exactly one of loss_fn .* got both"),
        (
            {"loss_fn": lambda p: p["head"]["b"]},
            TypeError,
            r"loss_fn must return one real floating scalar, got float32\[3\]",
        ),
        ({"loss_fn": lambda p: (loss_fn(p), 1)}, TypeError, "loss_fn must return one real"),
        ({"loss_fn": lambda p: None}, TypeError, "loss_fn must return one real"),
        (
            {"grads": {"hidden": tuple(GRADS["hidden"].values()), "head": GRADS["head"]}},
            ValueError,
            r"grads does not match params: no leaf at \['hidden'\]\['b'\]",
        ),
        (
            {"params": [PARAMS["hidden"]["w"]], "grads": (GRADS["hidden"]["w"],)},
            ValueError,
            "grads does not match params: its containers are",
        ),
        ({"loss_fn": lambda p: 1}, TypeError, "loss_fn must return one real"),
        (
            {"perturbation_loss_fn": lambda p: p["head"]["b"]},
            TypeError,
            "perturbation_loss_fn must return one real",
        ),
        (
            {"grads": {"hidden": GRADS["hidden"]}},
            ValueError,
            r"grads does not match params: no leaf at \['head'\]\['b'\]",
        ),
        (
            {"grads": {**GRADS, "more": jnp.zeros(1)}},
            ValueError,
            r"grads does not match params, which has no leaf at \['more'\]",
        ),
        (
            {"loss_fn": None, "grad_fn": lambda p: p["head"]},
            ValueError,
            "what grad_fn returned does not match params",
        ),
        (
            {"grads": jax.tree.map(lambda g: g[None], GRADS)},
            ValueError,
            r"grads does not match params: shape \(1, 3\) at \['head'\]\['b'\]",
        ),
        (
            {"params": jax.tree.map(lambda p: p.astype(jnp.complex64), PARAMS)},
            TypeError,
            "complex parameters are not supported",
        ),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_errors(method, change, error, message, jit):
    tx = method.make(rho=0.1)
    arguments = {"grads": GRADS, "params": PARAMS, "loss_fn": loss_fn} | change
    grads, params = arguments.pop("grads"), arguments.pop("params")
    state = tx.init(PARAMS)

    def call():
        return tx.update(grads, state, params, **method.extra_args, **arguments)

    with pytest.raises(error, match=message):
        jax.jit(call)() if jit else call()
