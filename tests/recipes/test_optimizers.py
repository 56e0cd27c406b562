"""Recipes for what is around the step: optimizers, accumulation, precision, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bisam_jax
from tests.recipes.pages import (
    CLOSE,
    PARAMS,
    TWO_LAYERS,
    a_batch,
    assert_close,
    moved,
    names_of,
    q,
    reference,
    softmax_losses,
)


def test_frozen_and_lora():
    names, batch = names_of("frozen-and-lora"), a_batch()
    params, tx = names["params"], names["tx"]
    _, updates, _ = names["step"](params, tx.init(params), batch)
    assert moved(params["head"], params["head"] + updates["head"]) > 0
    ball = names["perturbed"]
    eps, _ = ball.update(jax.tree.map(jnp.ones_like, params), ball.init(params), params)
    assert not eps["head"].any()
    np.testing.assert_allclose(optax.tree.norm(eps), 0.05, **CLOSE)
    state = bisam_jax.sharpness_aware(ball).init(params)
    assert moved(names["head_kept"](params, state, batch)[1], params) > 0


def test_mixed_precision():
    names, batch = names_of("mixed-precision"), a_batch()
    params = {"w": PARAMS["w"], "v": jnp.eye(3)}
    carry = [params, names["method"].init(params), names["optimizer"].init(params)]
    values = []
    for _ in range(30):
        *carry, value = names["train_step"](*carry, batch)
        values.append(value)
    assert values[-1] < 0.9 * values[0]
    huge = batch | {"x": 1e5 * batch["x"]}  # overflows in float16
    after = names["train_step"](*carry, huge)[0]
    assert moved(carry[0], after) == 0


@pytest.mark.parametrize("base", ["adam", "lion", "muon", "schedule-free"])
def test_optimizers(base):
    names, batch = names_of("optimizers"), a_batch()
    params = TWO_LAYERS
    tx, step = names["step_with"](names["bases"][base])
    state, first = tx.init(params), None
    for _ in range(20):
        value, updates, state = step(params, state, batch)
        params, first = optax.apply_updates(params, updates), value if first is None else first
    assert value < first
    if base == "schedule-free":
        averaged = names["contrib"].schedule_free_eval_params(state[-1], params)
        assert moved(params, averaged) > 0


def test_accumulation():
    names, batch = names_of("accumulation"), a_batch()
    whole, parts, base = names["whole"], names["parts"], names["base"]
    _, updates, _ = names["step"](PARAMS, whole.init(PARAMS), batch)
    method = bisam_jax.bisam(0.05)
    assert_close(
        optax.apply_updates(PARAMS, updates),
        reference(PARAMS, batch, method, base, *names["losses"]),
    )
    state = parts.init(PARAMS)
    for part in range(4):
        of_part = jax.tree.map(lambda x, part=part: x[16 * part : 16 * part + 16], batch)
        _, updates, state = names["part_step"](PARAMS, state, of_part)
    grouped = bisam_jax.value_and_grad(method, *names["losses"], group_size=16)
    _, grads, _ = grouped(PARAMS, method.init(PARAMS), batch)
    assert_close(updates, base.update(grads, base.init(PARAMS))[0])


def test_rho_schedule():
    names, batch = names_of("rho-schedule"), a_batch()
    tx, base = names["tx"], optax.sgd(0.1, momentum=0.9)
    _, updates, state = names["step"](PARAMS, tx.init(PARAMS), batch)
    plain = reference(PARAMS, batch, optax.identity(), base, softmax_losses)
    assert_close(optax.apply_updates(PARAMS, updates), plain)  # rho starts at 0
    assert state[0].perturbation_state.radius_count == 1
    adjustable = names["adjustable"]
    state = names["with_rho"](adjustable.init(PARAMS), 0.5)
    losses = softmax_losses, q
    _, updates, _ = bisam_jax.value_and_grad(adjustable, *losses)(PARAMS, state, batch)
    expected = reference(PARAMS, batch, bisam_jax.bisam(0.5), base, *losses)
    assert_close(optax.apply_updates(PARAMS, updates), expected)


def test_late_and_periodic():
    names, batch = names_of("late-and-periodic"), a_batch()
    base, losses = names["optimizer"], names["losses"]
    sharp = reference(PARAMS, batch, bisam_jax.bisam(0.05), base, *losses)
    plain = reference(PARAMS, batch, optax.identity(), base, losses[0])
    state = names["method"].init(PARAMS), base.init(PARAMS)
    for step, expected in ((999, plain), (1000, sharp)):
        assert_close(names["train_step"](PARAMS, *state, batch, step)[0], expected)
    grads = [names["periodic"](PARAMS, state[0], batch, step=step)[1] for step in (4, 5)]
    assert moved(*grads) > 1e-4
