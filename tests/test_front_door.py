"""Every method through `value_and_grad`, called in every way."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from bisam_jax import logits_loss, value_and_grad
from tests.methods import METHODS, UPDATING, arguments_of, mean_of_trees
from tests.problems import (
    loss_of_batch,
    losses_of_batch,
    mlp_batch,
    mlp_params,
    perturbation_loss_of_batch,
    perturbation_losses_of_batch,
)

ALL = METHODS | UPDATING
each = pytest.mark.parametrize("name", ALL, scope="module")
each_gradient = pytest.mark.parametrize("name", METHODS, scope="module")
PARAMS, BATCH = mlp_params(), mlp_batch()
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def q_of(method, scalar=False):
    """Returns Q, or None if the method was built without it."""
    if method is UPDATING["sampa"]:
        return None
    return perturbation_loss_of_batch if scalar else perturbation_losses_of_batch


def two_steps(step, state, batch=BATCH, **extra_args):
    """Makes two steps at two points; the second step gets the state of the first."""
    results = []
    for scale in (1.0, 0.5):
        value, grads, state = step(optax.tree.scale(scale, PARAMS), state, batch, **extra_args)
        results.append((value, grads))
    return results, state


@functools.cache
def start(name, rho=0.3):
    return jax.jit(ALL[name].make(rho).init)(PARAMS)


def update_by_hand(name, q, params, state, batch):
    """Returns the output of `update`, with all arguments made by hand."""
    given = arguments_of(batch, q=q and "function")
    grads, state = ALL[name].make(0.3).update(None, state, params, **given)
    return (q or loss_of_batch)(params, batch), grads, state


def made(name, *, scalar=False, **options):
    method = ALL[name]
    loss_fn = loss_of_batch if scalar else losses_of_batch
    return value_and_grad(method.make(0.3), loss_fn, q_of(method, scalar), **options)


@functools.cache
def program(name):
    """Returns the step of the whole batch in every way; equal parts are compiled once."""
    method = ALL[name]
    ways = {
        "by hand": functools.partial(update_by_hand, name, q_of(method, scalar=True)),
        "losses": made(name),
        "one microbatch": made(name, microbatch_size=16),
    }
    if not method.examples:
        ways["scalar"] = made(name, scalar=True)
    if not method.needs_q:
        ways["by hand, without Q"] = functools.partial(update_by_hand, name, None)
        ways["without Q"] = value_and_grad(method.make(0.3), losses_of_batch)

    @jax.jit
    def step(params, states, batch):
        return {way: fn(params, states[way], batch) for way, fn in ways.items()}

    return step, dict.fromkeys(ways, start(name))


@functools.cache
def results_of(name):
    """Returns, for each way, value and gradient at two points, and the last state."""
    step, states = program(name)
    results = {way: [] for way in states}
    for scale in (1.0, 0.5):
        params = optax.tree.scale(scale, PARAMS)
        for way, (value, grads, state) in step(params, states, BATCH).items():
            results[way].append((value, grads))
            states = states | {way: state}
    return {way: (results[way], states[way]) for way in states}


def by_hand(name):
    return results_of(name)["by hand"]


@functools.cache
def through_the_door(name, **options):
    return two_steps(jax.jit(made(name, **options)), start(name))


def check(actual, expected):
    (results, state), (expected_results, expected_state) = actual, expected
    chex.assert_trees_all_close(results, expected_results, **CLOSE)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected_state)
    numbers = [
        [
            leaf
            for leaf in jax.tree.leaves(tree)
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        ]
        for tree in (state, expected_state)
    ]
    chex.assert_trees_all_close(*numbers, **CLOSE)


@each
def test_losses_per_example(name):
    check(results_of(name)["losses"], by_hand(name))


@each
def test_a_scalar(name):
    if ALL[name].examples:
        with pytest.raises(ValueError, match="return one loss per example from loss_fn"):
            made(name, scalar=True)(PARAMS, start(name), BATCH)
        return
    check(results_of(name)["scalar"], by_hand(name))


@each
def test_without_q(name):
    if ALL[name].needs_q:
        message = "pass perturbation_loss_fn"
        with pytest.raises(ValueError, match=message) as error:
            value_and_grad(ALL[name].make(0.3), losses_of_batch)(PARAMS, start(name), BATCH)
        assert "update" not in str(error.value)
        return
    check(results_of(name)["without Q"], results_of(name)["by hand, without Q"])


def test_q_to_a_method_that_was_built_without_it():
    tx = UPDATING["sampa"].make(0.3)
    step = value_and_grad(tx, losses_of_batch, perturbation_losses_of_batch)
    with pytest.raises(ValueError, match=r"sampa\(..., bilevel=True\)"):
        step(PARAMS, tx.init(PARAMS), BATCH)


@each
def test_microbatches_give_the_step_of_the_whole_batch(name):
    check(results_of(name)["one microbatch"], by_hand(name))
    check(through_the_door(name, microbatch_size=4), by_hand(name))


TWO_GROUPS = mlp_batch(examples=32)


# Those with a state or single examples, and one without: the other methods only differ in what they
# do with gradients, which is the same for a group. With microbatches, one whose state is neither
# counted nor averaged.
each_grouping = [
    *((name, None) for name in ("bisam", "sparse fisher")),
    *(
        pytest.param(*known, marks=pytest.mark.slow)
        for known in [
            ("look", None),
            ("sparse dynamic", 16),
            ("friendly", None),
            ("efficient", None),
            ("functional", None),
            ("bisam", 16),
            ("efficient", 16),
        ]
    ),
]


@pytest.mark.parametrize(("name", "microbatch_size"), each_grouping, scope="module")
def test_groups_are_steps_of_their_own(name, microbatch_size):
    step, states = program(name)
    groups = [jax.tree.map(lambda x, i=i: x[i : i + 16], TWO_GROUPS) for i in (0, 16)]
    alone = [step(PARAMS, states, group)["losses"] for group in groups]
    grouped = made(name, group_size=16, microbatch_size=microbatch_size)
    value, grads, state = jax.jit(grouped)(PARAMS, start(name), TWO_GROUPS)
    expected = mean_of_trees([result[:2] for result in alone])
    chex.assert_trees_all_close((value, grads), expected, **CLOSE)
    for leaf, *each in zip(*map(jax.tree.leaves, (state, *(s for *_, s in alone))), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            np.testing.assert_allclose(leaf, np.mean(each, 0), **CLOSE)
        else:
            assert (leaf == each[-1]).all()


@pytest.mark.parametrize("name", UPDATING)
@pytest.mark.parametrize("option", ["group_size", "when"])
def test_what_needs_gradients_refuses_updates(name, option):
    options = {"group_size": {"group_size": 4}, "when": {"when": lambda step: step > 3}}[option]
    with pytest.raises(ValueError, match=f"{option} cannot be used with sampa"):
        made(name, **options)(PARAMS, start(name), BATCH, step=0)


# The other tests cover the steps. These include one with a state and one with single examples.
BY_DEFAULT = [("bisam", {}), ("bisam", {"microbatch_size": 4}), ("efficient", {})]
each_when = [
    pytest.param(name, sizes, marks=[] if (name, sizes) in BY_DEFAULT else pytest.mark.slow)
    for name, sizes in [
        *BY_DEFAULT,
        ("look", {}),
        ("look", {"group_size": 4}),
    ]
]


@pytest.mark.parametrize(("name", "sizes"), each_when)
def test_when(name, sizes):
    step = made(name, when=lambda step: step >= 3, **sizes)

    @jax.jit
    def both(params, state, batch):
        early, late = (step(params, state, batch, step=jnp.int32(i)) for i in (2, 3))
        # `step` is known while tracing: only one branch is compiled.
        known = step(params, state, batch, step=2)
        return early, late, known

    early, late, known = both(PARAMS, start(name), BATCH)
    plain = jax.value_and_grad(loss_of_batch)(PARAMS, BATCH)
    for value, grads, state in (early, known):
        chex.assert_trees_all_close((value, grads), plain, **CLOSE)
        chex.assert_trees_all_equal(state, start(name))
    expected = made(name, **sizes)
    check(
        ([late[:2]], late[2]),
        (lambda result: ([result[:2]], result[2]))(jax.jit(expected)(PARAMS, start(name), BATCH)),
    )
    # `step` is traced: one program for both.
    traced = jax.jit(step)
    for i, want in ((2, early), (3, late)):
        got = traced(PARAMS, start(name), BATCH, step=jnp.int32(i))
        check(([got[:2]], got[2]), ([want[:2]], want[2]))
    assert traced._cache_size() == 1


@pytest.mark.slow
@each
@pytest.mark.usefixtures("standard_promotion")
def test_inject_hyperparams_under_jit(name):
    method = ALL[name]
    tx = optax.inject_hyperparams(method.make, static_args=method.structural)(rho=0.3)
    step = jax.jit(value_and_grad(tx, losses_of_batch, q_of(method)))
    results, state = two_steps(step, tx.init(PARAMS))
    check((results, state.inner_state), by_hand(name))


# By `update`, every method is tested with narrow parameters in test_contract.py.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bisam", "gsam", "efficient", "sampa"])
def test_bfloat16(name):
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = ALL[name].make(0.3)
    state = tx.init(narrow)
    value, grads, new_state = jax.jit(made(name))(narrow, state, BATCH)
    chex.assert_trees_all_equal_dtypes(grads, narrow)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert value.dtype == jnp.float32
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    _, expected, _ = jax.jit(made(name))(wide, tx.init(wide), BATCH)
    difference = jax.tree.map(lambda g, e: g.astype(jnp.float32) - e, grads, expected)
    # The ascent gradient is in bfloat16, and some methods choose examples or weights by it.
    loose = 0.5 if ALL[name].examples else 0.05
    assert optax.tree.norm(difference) < loose * optax.tree.norm(expected)


@pytest.mark.slow
@each
def test_export(name):
    step, platforms = jax.jit(made(name)), ["tpu", "cuda", "rocm"]
    exported = export.export(step, platforms=platforms)(PARAMS, start(name), BATCH)
    assert exported.platforms == ("tpu", "cuda", "rocm")


@each
def test_the_state_keeps_its_type(name):
    step, states = program(name)
    programs = []
    for _ in range(3):
        new = {way: state for way, (_, _, state) in step(PARAMS, states, BATCH).items()}
        chex.assert_trees_all_equal_structs(states, new)
        for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(new), strict=True):
            assert jax.typeof(a) == jax.typeof(b)
        states = new
        programs.append(step._cache_size())
    # Its own new state needs no new program.
    assert programs[1] == programs[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, method in ALL.items() if method.examples])
def test_functions_of_examples_can_be_replaced(name):
    """Functions of the user, which here use other examples, replace those of the step."""
    other = mlp_batch(seed=5)
    own = {
        key: value
        for key, value in arguments_of(other).items()
        if key in ("example_losses_fn", "fisher_scores_fn")
    }
    step = made(name)
    replaced = jax.jit(lambda p, s, b: step(p, s, b, **own))(PARAMS, start(name), BATCH)
    difference = optax.tree.sub(replaced[1], results_of(name)["losses"][0][0][1])
    assert optax.tree.norm(difference) > 1e-3
    with_scalars = made(name, scalar=True)
    same = jax.jit(lambda p, s, b: with_scalars(p, s, b, **own))(PARAMS, start(name), BATCH)
    chex.assert_trees_all_close(same[1], replaced[1], **CLOSE)


@pytest.mark.slow
@each
def test_leaves_that_are_not_floating(name):
    """Such leaves change nothing, and get no updates."""
    params = {"net": PARAMS, "count": jnp.array(3), "none": None}
    if not ALL[name].contains_optimizer:  # optax's optimizers cannot scale what JAX gives for a key
        params["key"] = jax.random.key(0)

    def of_net(fn):
        if fn is None:
            return None
        return lambda params, batch: fn(params["net"], batch)

    loss_fn = logits_loss(of_net(losses_of_batch.logits_fn), losses_of_batch.loss)
    method = ALL[name]
    tx = method.make(0.3)
    step = jax.jit(value_and_grad(tx, loss_fn, of_net(q_of(method))))
    value, grads, _ = step(params, tx.init(params), BATCH)
    (expected_value, expected), *_ = by_hand(name)[0]
    if name not in DRAWING:
        chex.assert_trees_all_close((value, grads["net"]), (expected_value, expected), **CLOSE)
    assert grads["count"] == 0
    assert grads["none"] is None


# Their random draws depend on the position of a leaf in the tree.
DRAWING = ("tilted", "efficient", "sparse dynamic")


@each
def test_no_floating_leaf_at_all(name):
    method, params = ALL[name], {"count": jnp.array(3)}

    def losses(params, batch):
        return batch["y"].astype(jnp.float32) * params["count"].astype(jnp.float32)

    loss_fn = logits_loss(losses, lambda losses, batch: losses)
    tx = method.make(0.3)
    step = value_and_grad(tx, loss_fn, None if q_of(method) is None else losses)
    _, grads, _ = jax.eval_shape(step, params, tx.init(params), BATCH)
    assert grads["count"].shape == ()
