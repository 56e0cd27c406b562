"""What `update` of every method must do: one table, one set of tests.

Compiling takes nearly all of the time, so each method is compiled once for many tests, and the
tests run method by method.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import logits_loss
from tests.compiled import quick_jit
from tests.methods import METHODS, arguments_of, loss_of_params
from tests.problems import mlp_batch, mlp_params, perturbation_loss_of_batch

TAKING_GRAD_FN = {name: method for name, method in METHODS.items() if method.takes_grad_fn}
# Of module scope: all tests of a method run one after another, and share what it compiles.
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS, scope="module")
each_taking_grad_fn = pytest.mark.parametrize(
    "method", TAKING_GRAD_FN.values(), ids=TAKING_GRAD_FN, scope="module"
)

PARAMS, BATCH = mlp_params(), mlp_batch()
loss_fn = loss_of_params(BATCH)


def perturbation_loss_fn(params):
    return perturbation_loss_of_batch(params, BATCH)


gradient = quick_jit(jax.grad(loss_fn))
GRADS = gradient(PARAMS)
GRADS_OF_Q = quick_jit(jax.grad(perturbation_loss_fn))(PARAMS)


def update(method, tx, state, params, grads, *, q=None, **extra_args):
    """With everything that any method asks for; with Q where the method insists on it."""
    if method.needs_q and q is None and "perturbation_grads" not in extra_args:
        q = "function"
    arguments = arguments_of(BATCH, q=q, params=params) | extra_args
    return tx.update(grads, state, params, **arguments)


def first_grads(method, tx, params, grads, **extra_args):
    return update(method, tx, tx.init(params), params, grads, **extra_args)[0]


@functools.cache
def start(method):
    return quick_jit(method.make(rho=0.1).init)(PARAMS)


@functools.cache
def compiled_update(method, q=None, grads=True, more=()):
    """An update of a constant radius, with all that is a number as an argument."""

    @quick_jit
    def step(rho, state, params, grads_given):
        given = grads_given if grads else None
        return update(method, method.make(rho=rho), state, params, given, q=q, **dict(more))

    return step


def sharp(method, rho, params=PARAMS, grads=GRADS, q=None):
    """The descent gradient at the first step."""
    return compiled_update(method, q)(rho, start(method), params, grads)[0]


def two_steps(method, rho, q=None, grads=True):
    """At two places, with the state of the first step in the second."""
    step, results, state = compiled_update(method, q, grads), [], start(method)
    for scale in (1.0, 0.5):
        params = optax.tree.scale(scale, PARAMS)
        result, state = step(rho, state, params, gradient(params))
        results.append(result)
    return results


def training(method):
    """A step of training, with a schedule before the base optimizer and momentum in it."""
    tx = optax.chain(method.make(rho=lambda count: 0.1), optax.sgd(0.1, momentum=0.9))

    def step(carry, _=None):
        params, state = carry
        updates, state = update(method, tx, state, params, jax.grad(loss_fn)(params))
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
@pytest.mark.parametrize("q", [None, "function"])
def test_zero_radius_is_the_base_optimizer(method, q):
    for params, grads in zip((1.0, 0.5), two_steps_without_noise(method, 0.0, q), strict=True):
        expected = gradient(optax.tree.scale(params, PARAMS))
        chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
    # As a Python number, zero is taken too.
    tx = method.make(rho=0.0)
    jax.eval_shape(functools.partial(first_grads, method, tx), PARAMS, GRADS)


def two_steps_without_noise(method, rho, q):
    if method is METHODS["tilted"]:
        method = WITHOUT_NOISE
    if method is METHODS["efficient"]:
        method = WITH_ALL_EXAMPLES
    return two_steps(method, rho, q)


WITHOUT_NOISE = dataclasses.replace(
    METHODS["tilted"], make=functools.partial(METHODS["tilted"].make, radius=0.0)
)
WITH_ALL_EXAMPLES = dataclasses.replace(
    METHODS["efficient"], make=functools.partial(METHODS["efficient"].make, gamma=1.0)
)


@each_method
def test_zero_ascent_gradient_is_the_plain_step(method):
    if not method.takes_gradient_of_q:
        method = WITHOUT_NOISE
        zero = {"perturbation_loss_fn": lambda params: 0.0 * loss_fn(params)}
    else:
        zero = {"perturbation_grads": optax.tree.zeros_like(PARAMS)}
    if method is METHODS["efficient"]:
        method = WITH_ALL_EXAMPLES
    tx = method.make(rho=0.1)
    grads = quick_jit(lambda p, g: first_grads(method, tx, p, g, **zero))(PARAMS, GRADS)
    chex.assert_trees_all_close(grads, GRADS, rtol=1e-5, atol=1e-6)


@each_method
def test_radius_matters(method):
    small, large = (sharp(method, rho) for rho in (0.05, 0.5))
    assert optax.tree.norm(optax.tree.sub(small, large)) > 1e-3
    for grads in (small, large):
        assert optax.tree.norm(optax.tree.sub(grads, GRADS)) > 1e-3


@each_method
@pytest.mark.parametrize("q", [None, "function"])
def test_grads_are_the_gradient_of_the_loss_or_none(method, q):
    given = two_steps(method, 0.5, q)
    chex.assert_trees_all_close(two_steps(method, 0.5, q, grads=False), given, rtol=1e-4, atol=1e-5)


@each_method
def test_the_gradient_of_q_stands_for_q(method):
    with_q = two_steps(method, 0.5, "function")
    if not method.takes_gradient_of_q:
        with pytest.raises(ValueError, match="perturbation_grads is valid only at params"):
            two_steps(method, 0.5, "gradient")
        return
    for grads in (True, False):
        by_gradient = two_steps(method, 0.5, "gradient", grads=grads)
        chex.assert_trees_all_close(by_gradient, with_q, rtol=1e-4, atol=1e-5)


@each_method
def test_q_is_what_is_ascended(method):
    if method.needs_q:
        with pytest.raises(ValueError, match=r"bisam needs a perturbation loss .* use sam"):
            method.make(0.5).update(GRADS, start(method), PARAMS, **arguments_of(BATCH))
        return
    with_q, without = two_steps(method, 0.5, "function"), two_steps(method, 0.5)
    assert optax.tree.norm(optax.tree.sub(with_q[0], without[0])) > 1e-3


@each_taking_grad_fn
def test_functions_are_called_once(method):
    calls = {"loss": 0, "perturbation": 0}

    def counted_loss(params):
        calls["loss"] += 1
        return loss_fn(params)

    def counted_perturbation_loss(params):
        calls["perturbation"] += 1
        return perturbation_loss_fn(params)

    def trace(grads, **extra_args):
        calls["loss"] = calls["perturbation"] = 0
        step = functools.partial(first_grads, method, method.make(rho=0.1), **extra_args)
        jax.eval_shape(step, PARAMS, grads)

    q = {"perturbation_loss_fn": counted_perturbation_loss}
    if not method.needs_q:
        trace(GRADS, loss_fn=counted_loss)
        assert calls == {"loss": method.loss_calls, "perturbation": 0}
        trace(None, loss_fn=counted_loss)
        assert calls == {"loss": method.loss_calls + 1, "perturbation": 0}
    trace(GRADS, loss_fn=counted_loss, **q)
    assert calls == {"loss": method.loss_calls, "perturbation": 1}
    trace(None, loss_fn=counted_loss, **q)
    assert calls == {"loss": method.loss_calls + method.needs_clean, "perturbation": 1}


@each_method
def test_under_conditionally_transform_a_skipped_step_passes_on_the_gradient_of_l(method):
    tx = optax.conditionally_transform(method.make(rho=0.5), lambda step: step % 2 == 0)

    @quick_jit
    def step(state, grads):
        return update(method, tx, state, PARAMS, grads, q="function")

    state = tx.init(PARAMS)
    sharp_grads, state = step(state, GRADS)
    chex.assert_trees_all_close(sharp_grads, sharp(method, 0.5, q="function"), rtol=1e-4, atol=1e-5)
    skipped, after = step(state, GRADS)
    chex.assert_trees_all_equal(skipped, GRADS)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    with pytest.raises(TypeError, match="cond branch outputs"):
        step(state, None)


@each_method
@pytest.mark.usefixtures("standard_promotion")
def test_inject_hyperparams_under_jit(method):
    expected = sharp(method, 0.3, q="function")
    static = method.structural
    injected = optax.inject_hyperparams(method.make, static_args=static)(rho=0.1)
    state = injected.init(PARAMS)
    state.hyperparams["rho"] = jnp.float32(0.3)

    @quick_jit
    def step(state):
        return update(method, injected, state, PARAMS, GRADS, q="function")

    grads, _ = step(state)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-5)


STRUCTURAL = [(method, name) for method in METHODS.values() for name in method.structural]


@pytest.mark.parametrize(("method", "name"), STRUCTURAL, ids=[name for _, name in STRUCTURAL])
@pytest.mark.usefixtures("standard_promotion")
def test_what_shapes_the_program_cannot_be_traced(method, name):
    injected = optax.inject_hyperparams(method.make)(rho=0.1)
    state = injected.init(PARAMS)
    with pytest.raises(TypeError, match=f"{name} sets array shapes.*static_args='{name}'"):
        jax.jit(lambda s: update(method, injected, s, PARAMS, GRADS))(state)


@each_method
@pytest.mark.usefixtures("standard_promotion")
def test_the_same_everywhere(method):
    """With unknown extra args only, in a chain, by grad_fn, with a mask after it.

    In one program, where what is equal is compiled once.
    """
    tx = method.make(rho=0.1)
    chain = optax.chain(tx, optax.scale(2.0), optax.contrib.reduce_on_plateau(patience=2))
    mask = {"hidden": True, "head": False}
    masked = optax.chain(tx, optax.masked(optax.set_to_zero(), mask))

    @quick_jit
    def everywhere(params, grads):
        call = functools.partial(update, method, chain)
        chained, state = call(chain.init(params), params, grads, unknown=1, value=2.0)
        _, state = call(state, params, grads, unknown=1, value=3.0)
        equal = {
            "alone": first_grads(method, tx, params, grads),
            "with unknown": first_grads(method, tx, params, grads, unknown=1, value=2.0),
            "halved": optax.tree.scale(0.5, chained),
        }
        if method.takes_grad_fn:
            by_grad_fn = {"loss_fn": None, "grad_fn": jax.grad(loss_fn)}
            equal["by grad_fn"] = first_grads(method, tx, params, grads, **by_grad_fn)
        after = first_grads(method, masked, params, grads)
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
        _, state = compiled_update(method)(0.1, carry[1], PARAMS, GRADS)
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
        return first_grads(method, method.make(rho=lambda count: rho), params, grads)

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
    jax.eval_shape(
        jax.vmap(lambda rho: first_grads(method, method.make(rho=rho), PARAMS, GRADS)), rhos
    )


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


@each_taking_grad_fn
@pytest.mark.usefixtures("float64")
def test_grad_through_the_step_and_remat(method):
    tx, params = method.make(rho=0.1), mlp_params(dtype=jnp.float64)
    direction = jax.tree.map(lambda p: np.cos(np.arange(p.size)).reshape(p.shape), params)

    def loss_after_a_step(t, fn):
        point = jax.tree.map(lambda p, d: p + t * d, params, direction)
        more = {"loss_fn": fn, "fisher_scores_fn": lambda p: p}
        grads = first_grads(method, tx, point, jax.grad(fn)(point), **more)
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
        lambda *arguments: update(method, tx, *arguments, loss_fn=None, grad_fn=grad_fn)
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
    every = {
        "loss_fn": logits_loss(fn, lambda value: value),
        "perturbation_loss_fn": fn,
        "example_losses_fn": lambda p, indices: jnp.stack([fn(p)] * 2),
        "fisher_scores_fn": lambda p: p,
    }
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
    with pytest.raises(ValueError, match=r"freeze the other leaves before the ball"):
        optax.masked(method.make(rho=0.1), mask).init(PARAMS)


@each_method
def test_map_params(method):
    tx = optax.chain(method.make(rho=0.1), optax.trace(0.9))
    state = tx.init(PARAMS)
    ones = optax.tree.map_params(tx, jnp.ones_like, state)
    chex.assert_trees_all_equal(ones[1].trace, jax.tree.map(jnp.ones_like, PARAMS))
    chex.assert_trees_all_equal_structs(ones[0], state[0])


ERRORS = [
    ({"params": None}, ValueError, "params is missing"),
    ({"loss_fn": None}, ValueError, "exactly one of loss_fn .* got neither"),
    ({"grad_fn": jax.grad(loss_fn)}, ValueError, "exactly one of loss_fn .* got both"),
    (
        {"perturbation_grads": GRADS_OF_Q},
        ValueError,
        "at most one of perturbation_loss_fn .* and perturbation_grads .* got both",
    ),
    (
        {"loss_fn": lambda p: p["hidden"]["b"]},
        TypeError,
        r"loss_fn must return one real floating scalar, got float32\[6\]",
    ),
    ({"loss_fn": lambda p: (loss_fn(p), 1)}, TypeError, "loss_fn must return one real"),
    ({"loss_fn": lambda p: None}, TypeError, "loss_fn must return one real"),
    ({"loss_fn": lambda p: 1}, TypeError, "loss_fn must return one real"),
    (
        {"perturbation_loss_fn": lambda p: p["hidden"]["b"]},
        TypeError,
        "perturbation_loss_fn must return one real",
    ),
    (
        {"loss_fn": None, "grad_fn": lambda p: p["head"]},
        ValueError,
        "the output of grad_fn does not match params",
    ),
    (
        {"params": jax.tree.map(lambda p: p.astype(jnp.complex64), PARAMS)},
        TypeError,
        "complex parameters are not supported",
    ),
    (
        {"perturbation_loss_fn": None, "perturbation_grads": GRADS["hidden"]},
        ValueError,
        "perturbation_grads does not match params",
    ),
]
# Whether the method looks at them or not.
ERRORS_OF_GRADS = [
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
        {"grads": jax.tree.map(lambda g: g[None], GRADS)},
        ValueError,
        r"grads does not match params: shape \(1, 6, 3\) at \['head'\]\['w'\]",
    ),
]


@pytest.mark.parametrize(
    ("method", "change", "error", "message"),
    [(method, *case) for method in TAKING_GRAD_FN.values() for case in ERRORS + ERRORS_OF_GRADS],
)
@pytest.mark.parametrize("jit", [False, True])
def test_errors(method, change, error, message, jit):
    tx = method.make(rho=0.1)
    arguments = arguments_of(BATCH, q="function" if method.needs_clean or method.needs_q else None)
    if "perturbation_grads" in change:
        arguments["perturbation_loss_fn"] = perturbation_loss_fn
    arguments |= {"grads": GRADS, "params": PARAMS} | change
    grads, params = arguments.pop("grads"), arguments.pop("params")
    state = start(method)

    def call():
        return tx.update(grads, state, params, **arguments)

    with pytest.raises(error, match=message):
        jax.jit(call)() if jit else call()
