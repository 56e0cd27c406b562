"""What every method must do: one table, one set of tests.

Compiling takes nearly all of the time, so each method is compiled once for many tests, and the
tests run method by method.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.compiled import quick_jit
from tests.methods import METHODS, TAKING_GRAD_FN, largest_weights
from tests.problems import (
    loss_of_batch,
    mlp_batch,
    mlp_params,
    perturbation_loss_of_batch,
)

# Of module scope: all tests of a method run one after another, and share what it compiles.
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS, scope="module")
each_taking_grad_fn = pytest.mark.parametrize(
    "method", TAKING_GRAD_FN.values(), ids=TAKING_GRAD_FN, scope="module"
)

PARAMS, BATCH = mlp_params(), mlp_batch()


def loss_fn(params):
    return loss_of_batch(params, BATCH)


def perturbation_loss_fn(params):
    return perturbation_loss_of_batch(params, BATCH)


gradient = quick_jit(jax.grad(loss_fn))
GRADS = gradient(PARAMS)
GRADS_OF_Q = quick_jit(jax.grad(perturbation_loss_fn))(PARAMS)


def update(tx, state, params, grads, **extra_args):
    defaults = {"loss_fn": loss_fn, "fisher_scores_fn": largest_weights}
    extra_args = defaults | extra_args
    # The whole batch as one example, for the method that asks for examples.
    extra_args["example_losses_fn"] = lambda p, indices: extra_args["loss_fn"](p)[None]
    return tx.update(grads, state, params, **extra_args)


def first_grads(tx, params, grads, **extra_args):
    return update(tx, tx.init(params), params, grads, **extra_args)[0]


@functools.cache
def start(method):
    return quick_jit(method.make(rho=0.1).init)(PARAMS)


@functools.cache
def compiled_update(method):
    """An update of a constant radius, with all that is a number as an argument."""
    # What the clean pass knows besides, for the method that ascends by itself.
    more = {"ascent_loss_fn": perturbation_loss_fn} if method.ascends_loss_fn else {}

    @functools.partial(quick_jit, static_argnames="from_q")
    def step(rho, state, params, grads, clean, from_q=False):
        extra_args = {"clean_grad_fn": lambda: clean} | (more if from_q else {})
        return update(method.make(rho=rho), state, params, grads, **extra_args)

    return step


def sharp(method, rho, params=PARAMS, grads=GRADS):
    """The descent gradient at the first step, where `grads` is that of the loss."""
    return compiled_update(method)(rho, start(method), params, grads, grads)[0]


@functools.cache
def compiled_update_with_q(method):
    """The descent gradient where `perturbation_loss_fn` is given."""

    @quick_jit
    def step(rho, state, params, grads):
        tx = method.make(rho=rho)
        return update(tx, state, params, grads, perturbation_loss_fn=perturbation_loss_fn)[0]

    return lambda rho: step(rho, start(method), PARAMS, GRADS)


def training(method):
    """A step of training, with a schedule before the base optimizer and momentum in it."""
    tx = optax.chain(method.make(rho=lambda count: 0.1), optax.sgd(0.1, momentum=0.9))

    def step(carry, _=None):
        params, state = carry
        updates, state = update(tx, state, params, jax.grad(loss_fn)(params))
        return (optax.apply_updates(params, updates), state), None

    return step, tx.init


@functools.cache
def donating_step(method):
    step, init = training(method)
    return quick_jit(lambda carry: step(carry)[0], donate_argnums=0), init


def fresh_carry(init):
    params = jax.tree.map(jnp.copy, PARAMS)
    return params, init(params)


@each_method
def test_zero_radius_is_the_base_optimizer(method):
    chex.assert_trees_all_close(sharp(method, 0.0), GRADS, rtol=1e-5, atol=1e-7)
    grads = compiled_update_with_q(method)(0.0)
    chex.assert_trees_all_close(grads, GRADS, rtol=1e-5, atol=1e-7)
    # As a Python number, zero is taken too.
    jax.eval_shape(functools.partial(first_grads, method.make(rho=0.0)), PARAMS, GRADS)


@each_taking_grad_fn
def test_zero_gradient_is_the_plain_step(method):
    zeros = optax.tree.zeros_like(PARAMS)
    grads, _ = compiled_update(method)(0.1, start(method), PARAMS, zeros, GRADS)
    chex.assert_trees_all_close(grads, GRADS, rtol=1e-5, atol=1e-7)


@each_method
def test_radius_matters(method):
    small, large = (sharp(method, rho) for rho in (0.05, 0.5))
    for grads in (small, large):
        assert optax.tree.norm(optax.tree.sub(grads, GRADS)) > 1e-3
    assert optax.tree.norm(optax.tree.sub(small, large)) > 1e-3


@each_method
def test_perturbation_loss_is_what_is_ascended(method):
    with_q = compiled_update_with_q(method)(0.5)
    with_grad_q, _ = compiled_update(method)(
        0.5, start(method), PARAMS, GRADS_OF_Q, GRADS, from_q=method.ascends_loss_fn
    )
    with_l = sharp(method, 0.5)
    chex.assert_trees_all_close(with_q, with_grad_q, rtol=1e-5, atol=1e-6)
    assert optax.tree.norm(optax.tree.sub(with_q, with_l)) > 1e-3


@each_method
def test_functions_are_called_once(method):
    calls = {"loss": 0, "perturbation": 0}

    def counted_loss(params):
        calls["loss"] += 1
        return loss_fn(params)

    def counted_perturbation_loss(params):
        calls["perturbation"] += 1
        return perturbation_loss_fn(params)

    def trace(**extra_args):
        step = functools.partial(first_grads, method.make(rho=0.1), **extra_args)
        jax.eval_shape(step, PARAMS, GRADS)

    trace(loss_fn=counted_loss)
    assert calls == {"loss": method.loss_calls, "perturbation": 0}
    calls["loss"] = 0
    trace(loss_fn=counted_loss, perturbation_loss_fn=counted_perturbation_loss)
    at_the_start = 1 if method.ascends_loss_fn else 0
    assert calls == {"loss": method.loss_calls - at_the_start, "perturbation": 1}


@each_method
@pytest.mark.usefixtures("standard_promotion")
def test_the_same_everywhere(method):
    """With unknown extra args alone, in a chain, under inject_hyperparams; by grad_fn; masked.

    In one program, where what is equal is compiled once.
    """
    tx = method.make(rho=0.1)
    injected = optax.inject_hyperparams(method.make)(rho=0.1)
    chain = optax.chain(tx, optax.scale(2.0), optax.contrib.reduce_on_plateau(patience=2))
    mask = {"hidden": True, "head": False}
    masked = optax.chain(tx, optax.masked(optax.set_to_zero(), mask))

    @quick_jit
    def everywhere(params, grads):
        chained, state = update(chain, chain.init(params), params, grads, unknown=1, value=2.0)
        _, state = update(chain, state, params, grads, unknown=1, value=3.0)
        equal = {
            "alone": first_grads(tx, params, grads),
            "with unknown": first_grads(tx, params, grads, unknown=1, value=2.0),
            "injected": first_grads(injected, params, grads, unknown=1),
            "halved": optax.tree.scale(0.5, chained),
        }
        if method.takes_grad_fn:
            by_grad_fn = {"loss_fn": None, "grad_fn": jax.grad(loss_fn)}
            equal["by grad_fn"] = first_grads(tx, params, grads, **by_grad_fn)
        after = first_grads(masked, params, grads)
        return equal, after, optax.tree.get(state, "plateau_count")

    expected = sharp(method, 0.1)
    equal, after, plateau_count = everywhere(PARAMS, GRADS)
    for grads in equal.values():
        chex.assert_trees_all_close(grads, equal["alone"], rtol=1e-6)
        chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-7)
    assert plateau_count == 1
    assert optax.tree.norm(after["hidden"]) == 0
    chex.assert_trees_all_close(after["head"], equal["alone"]["head"])


@each_method
def test_state_keeps_its_type_and_nothing_recompiles(method):
    def constant(carry):
        _, state = compiled_update(method)(0.1, carry[1], PARAMS, GRADS, GRADS)
        return carry[0], state

    scheduled, init = donating_step(method)
    starts = (PARAMS, start(method)), fresh_carry(init)
    for step, jitted, carry in zip(
        (constant, scheduled), (compiled_update(method), scheduled), starts, strict=True
    ):
        sizes = []
        for _ in range(3):
            new_carry = step(carry)
            state, new_state = carry[1], new_carry[1]
            chex.assert_trees_all_equal_structs(state, new_state)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
            for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True):
                assert jax.typeof(old) == jax.typeof(new)
                assert old.sharding == new.sharding
            carry = new_carry
            sizes.append(jitted._cache_size())
        assert len(set(sizes)) == 1


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
def test_size_of_the_state(method):
    weights = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    state = jax.tree.leaves(start(method))
    size = sum(leaf.nbytes for leaf in state)
    assert 0 <= size - method.state_bytes * weights <= 16


@each_method
def test_scan_and_donated_steps_agree(method):
    step, init = training(method)
    scanned, _ = quick_jit(lambda carry: jax.lax.scan(step, carry, length=4))(
        (PARAMS, init(PARAMS))
    )
    step, init = donating_step(method)
    looped = fresh_carry(init)
    for _ in range(4):
        before = looped
        looped = step(looped)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    chex.assert_trees_all_close(scanned[0], looped[0], rtol=1e-4, atol=1e-5)


@functools.cache
def vmapped_update(method):
    @quick_jit
    @jax.vmap
    def together(rho, params, grads):
        return first_grads(method.make(rho=lambda count: rho), params, grads)

    return together


@each_method
def test_vmap_over_rho(method):
    rhos = np.array([0.0, 0.1, 0.5], np.float32)
    three = jax.tree.map(lambda leaf: np.stack([leaf] * 3), (PARAMS, GRADS))
    together = vmapped_update(method)(rhos, *three)
    for i, rho in enumerate(rhos):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        chex.assert_trees_all_close(one, sharp(method, float(rho)), rtol=1e-5, atol=1e-6)
    # As a plain scalar, not a schedule's, too.
    jax.eval_shape(jax.vmap(lambda rho: first_grads(method.make(rho=rho), PARAMS, GRADS)), rhos)


@each_method
def test_vmap_over_seeds(method):
    seeds = [mlp_params_of(seed) for seed in range(3)]
    grads = [gradient(params) for params in seeds]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *zip(seeds, grads, strict=True))
    together = vmapped_update(method)(np.full(3, 0.1, np.float32), *stacked)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        alone = sharp(method, 0.1, seeds[i], grads[i])
        chex.assert_trees_all_close(one, alone, rtol=1e-5, atol=1e-6)


def mlp_params_of(seed):
    return jax.tree.map(lambda p, noise: p + 0.1 * noise, PARAMS, mlp_params(10 + seed))


@each_method
@pytest.mark.usefixtures("float64")
def test_grad_through_the_step_and_remat(method):
    tx, params = method.make(rho=0.1), mlp_params(dtype=jnp.float64)
    direction = jax.tree.map(lambda p: np.cos(np.arange(p.size)).reshape(p.shape), params)

    def loss_after_a_step(t, fn):
        point = jax.tree.map(lambda p, d: p + t * d, params, direction)
        grads = first_grads(tx, point, jax.grad(fn)(point), loss_fn=fn)
        return fn(jax.tree.map(lambda p, g: p - 0.1 * g, point, grads))

    @quick_jit
    def value_and_slopes(t):
        remat = jax.grad(loss_after_a_step)(t, jax.checkpoint(loss_fn))
        return *jax.value_and_grad(loss_after_a_step)(t, loss_fn), remat

    _, slope, remat = value_and_slopes(0.0)
    ahead, behind = (value_and_slopes(t)[0] for t in (1e-5, -1e-5))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)
    np.testing.assert_allclose(remat, slope, rtol=1e-12)


@each_taking_grad_fn
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_are_perturbed_in_float32(method, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    grads = jax.tree.map(lambda g: g.astype(dtype), gradient(wide))
    points = []

    def grad_fn(point):
        points.append(point)
        return jax.grad(loss_fn)(point)

    rho = 1e-3
    tx = method.make(rho=lambda count: rho)
    state = tx.init(params)
    got, new_state = quick_jit(
        lambda *arguments: update(tx, *arguments, loss_fn=None, grad_fn=grad_fn)
    )(state, params, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    chex.assert_trees_all_equal_dtypes(got, params)
    chex.assert_trees_all_equal_dtypes(points[0], wide)
    reference = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    expected = sharp(method, rho, wide, reference)
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
    new, _ = quick_jit(lambda g, p: tx.update(g, tx.init(p), p, **every))(grads, params)
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
            {"loss_fn": lambda p: p["hidden"]["b"]},
            TypeError,
            r"loss_fn must return one real floating scalar, got float32\[6\]",
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
            {"perturbation_loss_fn": lambda p: p["hidden"]["b"]},
            TypeError,
            "perturbation_loss_fn must return one real",
        ),
        (
            {"grads": {"hidden": GRADS["hidden"]}},
            ValueError,
            r"grads does not match params: no leaf at \['head'\]\['w'\]",
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
            r"grads does not match params: shape \(1, 6, 3\) at \['head'\]\['w'\]",
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
    state = start(method)

    def call():
        return tx.update(grads, state, params, **method.extra_args, **arguments)

    with pytest.raises(error, match=message):
        jax.jit(call)() if jit else call()
