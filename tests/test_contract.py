"""What `update` of every method must do: one table, one set of tests.

Compiling takes nearly all of the time. So all ways to call a method are in one program, which
compiles equal parts once, and the tests run method by method to share it.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from bisam_jax import logits_loss
from tests.methods import METHODS, arguments_of, loss_of_params
from tests.problems import mlp_batch, mlp_params, perturbation_loss_of_batch

TAKING_GRAD_FN = {name: method for name, method in METHODS.items() if method.takes_grad_fn}
# Module scope: all tests of a method run one after another, and share its compiled program.
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS, scope="module")
each_taking_grad_fn = pytest.mark.parametrize(
    "method", TAKING_GRAD_FN.values(), ids=TAKING_GRAD_FN, scope="module"
)

PARAMS, BATCH = mlp_params(), mlp_batch()
loss_fn = loss_of_params(BATCH)


def perturbation_loss_fn(params):
    return perturbation_loss_of_batch(params, BATCH)


gradient = jax.jit(jax.grad(loss_fn))
GRADS = gradient(PARAMS)


def update(method, tx, state, params, grads, *, q=None, **extra_args):
    """Calls `update` with every argument that a method may use, and with Q if it requires Q."""
    if method.needs_q and q is None and "perturbation_grads" not in extra_args:
        q = "function"
    arguments = arguments_of(BATCH, q=q, params=params) | extra_args
    return tx.update(grads, state, params, **arguments)


def first_grads(method, tx, params, grads, **extra_args):
    return update(method, tx, tx.init(params), params, grads, **extra_args)[0]


# How Q is given. "alone" means without the gradient of L.
WAYS = {"L": None, "Q": "function", "gradient of Q": "gradient"}


def ways_of(method):
    ways = dict(WAYS)
    if method.needs_q:
        del ways["L"]
    if not method.takes_gradient_of_q:
        del ways["gradient of Q"]
    return ways


@functools.cache
def starts(method):
    """Returns, for each way, the state of a method whose radius follows a schedule."""
    state = jax.jit(method.make(rho=lambda count: 0.1).init)(PARAMS)
    alone = [f"{way} alone" for way in ways_of(method)]
    return dict.fromkeys([*ways_of(method), *alone, "zero Q"], state)


@functools.cache
def program(method):
    """Returns an update in every way, with every number as an argument."""

    @jax.jit
    def step(rho, states, params, grads):
        call = functools.partial(update, method, method.make(rho=lambda count: rho))
        results = {}
        for way, q in ways_of(method).items():
            results[way] = call(states[way], params, grads, q=q)
            results[f"{way} alone"] = call(states[f"{way} alone"], params, None, q=q)
        zero = {"perturbation_loss_fn": lambda params: 0.0 * perturbation_loss_fn(params)}
        results["zero Q"] = call(states["zero Q"], params, grads, **zero)
        return results

    return step


def sharp(method, rho, params=PARAMS, grads=GRADS, q=None):
    """Returns the descent gradient of the first step."""
    way = "Q" if q or method.needs_q else "L"
    return program(method)(rho, starts(method), params, grads)[way][0]


@functools.cache
def two_steps(method, rho):
    """Returns the gradients of two steps at two points, in every way."""
    step, states, results = program(method), starts(method), {way: [] for way in starts(method)}
    for scale in (1.0, 0.5):
        params = optax.tree.scale(scale, PARAMS)
        for way, (grads, state) in step(rho, states, params, gradient(params)).items():
            results[way].append(grads)
            states = states | {way: state}
    return results


# One of each kind by default; all in CI.
_DEFAULT = ("bisam", "tilted", "sparse dynamic")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=[] if name in _DEFAULT else pytest.mark.slow)
        for name, method in METHODS.items()
    ],
    scope="module",
)
def test_zero_radius_is_the_base_optimizer(method):
    expected = [gradient(optax.tree.scale(scale, PARAMS)) for scale in (1.0, 0.5)]
    results = two_steps(without_chance(method), 0.0)
    for way in ways_of(method):
        chex.assert_trees_all_close(results[way], expected, rtol=1e-5, atol=1e-6)
    # Zero as a Python number is accepted too.
    tx = method.make(rho=0.0)
    jax.eval_shape(functools.partial(first_grads, method, tx, unknown=1), PARAMS, GRADS)


@each_method
def test_zero_ascent_gradient_is_the_plain_step(method):
    grads = two_steps(without_chance(method), 0.1)["zero Q"]
    chex.assert_trees_all_close(grads[0], GRADS, rtol=1e-5, atol=1e-6)


WITHOUT_NOISE = dataclasses.replace(
    METHODS["tilted"], make=functools.partial(METHODS["tilted"].make, num_samples=1, radius=0.0)
)
WITH_ALL_EXAMPLES = dataclasses.replace(
    METHODS["efficient"], make=functools.partial(METHODS["efficient"].make, gamma=1.0)
)


def without_chance(method):
    certain = {METHODS["tilted"]: WITHOUT_NOISE, METHODS["efficient"]: WITH_ALL_EXAMPLES}
    return certain.get(method, method)


@each_method
def test_radius_matters(method):
    small, large = (sharp(method, rho) for rho in (0.05, 0.5))
    assert optax.tree.norm(optax.tree.sub(small, large)) > 1e-3
    for grads in (small, large):
        assert optax.tree.norm(optax.tree.sub(grads, GRADS)) > 1e-3


@each_method
def test_grads_are_the_gradient_of_the_loss_or_none(method):
    results = two_steps(method, 0.5)
    for way in ways_of(method):
        chex.assert_trees_all_close(results[f"{way} alone"], results[way], rtol=1e-4, atol=1e-5)


@each_method
def test_the_gradient_of_q_stands_for_q(method):
    if not method.takes_gradient_of_q:
        with pytest.raises(ValueError, match="perturbation_grads is valid only at params"):
            first_grads(method, method.make(rho=0.5), PARAMS, GRADS, q="gradient")
        return
    results = two_steps(method, 0.5)
    chex.assert_trees_all_close(results["gradient of Q"], results["Q"], rtol=1e-4, atol=1e-5)


@each_method
def test_q_is_what_is_ascended(method):
    if method.needs_q:
        tx = method.make(0.5)
        with pytest.raises(
            ValueError, match=r"bisam needs a perturbation loss to ascend, and got none: .* use sam"
        ):
            tx.update(GRADS, tx.init(PARAMS), PARAMS, **arguments_of(BATCH))
        return
    results = two_steps(method, 0.5)
    assert optax.tree.norm(optax.tree.sub(results["Q"][0], results["L"][0])) > 1e-3


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


STRUCTURAL = [(method, name) for method in METHODS.values() for name in method.structural]


@pytest.mark.parametrize(("method", "name"), STRUCTURAL, ids=[name for _, name in STRUCTURAL])
@pytest.mark.usefixtures("standard_promotion")
def test_what_shapes_the_program_cannot_be_traced(method, name):
    injected = optax.inject_hyperparams(method.make)(rho=0.1)
    state = injected.init(PARAMS)
    with pytest.raises(TypeError, match=f"{name} sets array shapes.*static_args='{name}'"):
        jax.jit(lambda s: update(method, injected, s, PARAMS, GRADS))(state)


@each_method
def test_state_keeps_its_type_and_nothing_recompiles(method):
    step, old, compiled = program(method), starts(method), []
    for _ in range(2):
        results = step(0.1, old, PARAMS, GRADS)
        compiled.append(step._cache_size())
        new = {way: state for way, (_, state) in results.items()}
        chex.assert_trees_all_equal_structs(old, new)
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert jax.typeof(a) == jax.typeof(b)
            assert a.sharding == b.sharding
        old = new
    # Other tests call the same program with radii of other types.
    assert compiled[0] == compiled[1]


@each_method
def test_a_schedule_counts_perturbations(method):
    for _, state in program(method)(0.1, starts(method), PARAMS, GRADS).values():
        counts = [count for _, count in optax.tree.get_all_with_path(state, "radius_count")]
        assert counts
        assert set(map(int, counts)) == {1}


@each_method
def test_init_is_abstract(method):
    for rho in (0.1, lambda count: 0.1):
        tx = method.make(rho=rho)
        expected = jax.eval_shape(tx.init, PARAMS)
        structs = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
        chex.assert_trees_all_equal_structs(tx.init(structs), expected)
        narrow = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), PARAMS)
        chex.assert_trees_all_equal_structs(tx.init(narrow), expected)


@each_method
def test_size_of_the_state(method):
    weights = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    state = jax.eval_shape(method.make(rho=0.1).init, PARAMS)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert 0 <= size - method.state_bytes * weights <= 16


@each_taking_grad_fn
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
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
    got, new_state = jax.jit(
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
    with pytest.raises(ValueError, match=r"freeze the other leaves before the ball"):
        optax.masked(method.make(rho=0.1), mask).init(PARAMS)


@each_method
def test_map_params(method):
    tx = optax.chain(method.make(rho=0.1), optax.trace(0.9))
    state = tx.init(PARAMS)
    ones = optax.tree.map_params(tx, jnp.ones_like, state)
    chex.assert_trees_all_equal(ones[1].trace, jax.tree.map(jnp.ones_like, PARAMS))
    chex.assert_trees_all_equal_structs(ones[0], state[0])
