"""`value_and_grad` against the step written by hand: groups, microbatches, aux."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import bisam, l2_ball, sam, sharpness_aware, value_and_grad
from tests.problems import (
    loss_of_batch,
    mlp_batch,
    mlp_logits,
    mlp_params,
    perturbation_loss_of_batch,
    with_aux,
)

PARAMS, BATCH = mlp_params(), mlp_batch()
SAM, BISAM = sam(rho=0.3), bisam(rho=0.3)
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


@functools.cache
def step_of(loss_fn=loss_of_batch, q=None, *, tx=SAM, **arguments):
    """Returns a compiled step, shared by the tests with the same arguments."""
    return jax.jit(value_and_grad(tx, loss_fn, q, **arguments))


def result_of(*losses, tx=SAM, batch=None, **arguments):
    step = step_of(*losses, tx=tx, **arguments)
    return step(PARAMS, tx.init(PARAMS), BATCH if batch is None else batch)


@functools.partial(jax.jit, static_argnames=("tx", "q"))
def by_hand(tx, batch, q=perturbation_loss_of_batch):
    """Returns the step of the definition, on one batch."""
    value, ascent = jax.value_and_grad(q)(PARAMS, batch)

    def loss_fn(params):
        return loss_of_batch(params, batch)

    given = {"loss_fn": loss_fn, "perturbation_grads": ascent}
    return value, *tx.update(None, tx.init(PARAMS), PARAMS, **given)


def part_of(batch, part):
    return jax.tree.map(lambda x: x[part], batch)


def mean_of(trees):
    return jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), 0), *trees)


def test_aux_is_that_of_the_clean_pass():
    losses = with_aux(loss_of_batch), with_aux(perturbation_loss_of_batch)
    (value, aux), grads, _ = result_of(*losses, has_aux=True, tx=BISAM)
    chex.assert_trees_all_close(aux["logits"], mlp_logits(PARAMS, BATCH["x"]), **CLOSE)
    expected = by_hand(BISAM, BATCH)
    chex.assert_trees_all_close((value, grads), expected[:2], **CLOSE)
    # A loss that makes no clean pass may leave out aux.
    without = loss_of_batch, with_aux(perturbation_loss_of_batch)
    again = result_of(*without, has_aux=True, tx=BISAM)
    chex.assert_trees_all_close(again[:2], ((value, aux), grads), **CLOSE)


def test_each_function_is_called_once():
    calls = []

    def counted(name, fn):
        return lambda params, batch: (calls.append(name), fn(params, batch))[1]

    step = value_and_grad(
        BISAM, counted("loss", loss_of_batch), counted("q", perturbation_loss_of_batch)
    )
    jax.eval_shape(step, PARAMS, BISAM.init(PARAMS), BATCH)
    assert calls == ["q", "loss"]


@pytest.mark.parametrize("microbatch_size", [1, 4])
def test_microbatches_equal_the_whole_batch(microbatch_size):
    losses = with_aux(loss_of_batch), with_aux(perturbation_loss_of_batch)
    whole = result_of(*losses, has_aux=True, tx=BISAM)
    parts = result_of(*losses, has_aux=True, microbatch_size=microbatch_size, tx=BISAM)
    chex.assert_trees_all_close(parts, whole, **CLOSE)


@pytest.mark.parametrize("microbatch_size", [None, 8])
def test_groups_have_perturbations_of_their_own(microbatch_size):
    groups = [by_hand(BISAM, part_of(BATCH, slice(i, i + 4))) for i in range(0, 16, 4)]
    value, grads = mean_of([group[:2] for group in groups])
    losses = with_aux(loss_of_batch), with_aux(perturbation_loss_of_batch)
    sizes = {"group_size": 4, "microbatch_size": microbatch_size}
    (got_value, aux), got_grads, state = result_of(*losses, has_aux=True, tx=BISAM, **sizes)
    chex.assert_trees_all_close((got_value, got_grads), (value, grads), **CLOSE)
    chex.assert_trees_all_equal_structs(state, BISAM.init(PARAMS))
    logits = mlp_logits(PARAMS, BATCH["x"])
    expected = {"logits": logits, "mean": logits.mean(), "per class": logits.mean(0)}
    chex.assert_trees_all_close(aux, expected, **CLOSE)


def test_one_group_is_the_whole_batch_and_groups_of_one_are_examples():
    whole = result_of(loss_of_batch)
    chex.assert_trees_all_close(result_of(loss_of_batch, group_size=16), whole, **CLOSE)
    examples = [by_hand(SAM, part_of(BATCH, slice(i, i + 1)), loss_of_batch) for i in range(16)]
    alone = result_of(loss_of_batch, group_size=1)
    chex.assert_trees_all_close(alone[:2], mean_of([e[:2] for e in examples]), **CLOSE)
    assert optax.tree.norm(optax.tree.sub(alone[1], whole[1])) > 1e-3


@pytest.mark.parametrize(("group_size", "microbatch_size"), [(None, None), (4, 8)])
def test_state_moves_once_a_step(group_size, microbatch_size):
    schedule = optax.linear_schedule(0.1, 0.5, 4)
    tx = sam(schedule)
    sizes = {"group_size": group_size, "microbatch_size": microbatch_size}
    step = step_of(tx=tx, **sizes)

    @jax.jit
    def expected(rho):
        constant = sam(rho)
        step = value_and_grad(constant, loss_of_batch, **sizes)
        return step(PARAMS, constant.init(PARAMS), BATCH)[1]

    state = tx.init(PARAMS)
    for count in range(3):
        grads, state = step(PARAMS, state, BATCH)[1:]
        assert optax.tree.get(state, "radius_count") == count + 1
        chex.assert_trees_all_close(grads, expected(float(schedule(count))), **CLOSE)
    assert step._cache_size() == 1


@pytest.mark.parametrize("sizes", [{}, {"microbatch_size": 4}])
def test_a_chain_with_the_base_optimizer(sizes):
    tx = optax.chain(SAM, optax.sgd(0.1, momentum=0.9))
    _, updates, state = result_of(loss_of_batch, tx=tx, **sizes)
    _, grads, _ = result_of(loss_of_batch, **sizes)
    chex.assert_trees_all_close(updates, optax.tree.scale(-0.1, grads), **CLOSE)
    chex.assert_trees_all_close(optax.tree.get(state, "trace"), grads, **CLOSE)


@pytest.mark.parametrize("sizes", [{}, {"microbatch_size": 4}, {"group_size": 4}])
def test_leaves_that_are_not_floating_get_zeros(sizes):
    params = {"w": PARAMS, "steps": jnp.array(3), "key": jax.random.key(0)}

    def loss_fn(params, batch):
        return loss_of_batch(params["w"], batch)

    _, grads, _ = step_of(loss_fn, **sizes)(params, SAM.init(params), BATCH)
    assert grads["steps"] == 0
    assert grads["steps"].dtype == params["steps"].dtype
    assert grads["key"].dtype == jax.dtypes.float0
    chex.assert_trees_all_close(grads["w"], result_of(loss_of_batch, **sizes)[1], **CLOSE)


@pytest.mark.parametrize("sizes", [{}, {"microbatch_size": 1}, {"group_size": 4}])
def test_narrow_parameters_accumulate_in_float32(sizes):
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    batch = mlp_batch(examples=512)
    step = step_of(**sizes)
    _, grads, _ = step(narrow, SAM.init(narrow), batch)
    chex.assert_trees_all_equal_dtypes(grads, narrow)
    _, expected, _ = step(wide, SAM.init(wide), batch)
    difference = jax.tree.map(lambda g, e: g.astype(jnp.float32) - e, grads, expected)
    assert optax.tree.norm(difference) < 0.02 * optax.tree.norm(expected)


def test_extra_args_and_numpy_batches():
    """Outside of jit, arguments that are not JAX arrays stay unchanged."""

    def loss_fn(w, batch):
        return jnp.mean(jnp.square(batch["x"] @ w - batch["y"]))

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 3)).astype(np.float32), rng.normal(size=16).astype(np.float32)
    w, batch = jnp.ones(3), {"x": x, "y": y}
    for sizes in ({}, {"microbatch_size": 8}, {"group_size": 8}):
        step = value_and_grad(SAM, loss_fn, **sizes)
        with_extra = step(w, SAM.init(w), batch, unknown=jnp.ones(3), step=7)
        expected = jax.jit(step)(w, SAM.init(w), batch)
        chex.assert_trees_all_close(with_extra, expected, **CLOSE)


def test_integer_aux_of_one_or_several_parts():
    def loss_fn(params, batch):
        return loss_of_batch(params, batch), mlp_logits(params, batch["x"]).argmax(-1) == batch["y"]

    def correct(**sizes):
        return result_of(loss_fn, has_aux=True, **sizes)[0][1]

    for size in (4, 16):
        for name in ("group_size", "microbatch_size"):
            np.testing.assert_array_equal(correct(**{name: size}), correct())


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1), l2_ball(0.1), optax.adam(0.1)], ids=["sgd", "ball", "adam"]
)
def test_a_transformation_that_never_descends_is_refused(tx):
    step = value_and_grad(tx, loss_of_batch, perturbation_loss_of_batch)
    with pytest.raises(ValueError, match="tx made no gradient of perturbation_loss_fn"):
        jax.eval_shape(step, PARAMS, tx.init(PARAMS), BATCH)


def test_tx_must_be_a_transformation():
    with pytest.raises(TypeError, match="tx must be an optax transformation"):
        value_and_grad(bisam, loss_of_batch)


def test_per_example_keys_are_split_with_the_batch():
    batch = {**BATCH, "key": jax.random.split(jax.random.key(3), 16)}

    def noisy(params, batch):
        noise = jax.vmap(jax.random.normal)(batch["key"])
        return (noise * mlp_logits(params, batch["x"])[:, 0]).mean()

    whole = result_of(noisy, batch=batch)
    parts = result_of(noisy, batch=batch, microbatch_size=4)
    chex.assert_trees_all_close(parts, whole, **CLOSE)


def test_step_is_handed_on_with_when_and_without():
    seen = []

    def spy(updates, params=None, **extra_args):
        seen.append(extra_args["step"])
        return updates

    ball = optax.stateless(lambda updates, params: updates)
    ball = optax.GradientTransformationExtraArgs(
        ball.init, lambda u, s, p=None, **extra: (spy(u, p, **extra), s)
    )
    tx = sharpness_aware(optax.chain(ball, l2_ball(0.1)))
    for options in ({}, {"when": lambda step: step > 3}):
        value_and_grad(tx, loss_of_batch, **options)(PARAMS, tx.init(PARAMS), BATCH, step=5)
    assert seen == [5, 5]
