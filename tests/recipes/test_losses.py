"""Recipes for a loss: masks, labels, regression, reinforcement learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.recipes.pages import CLOSE, PARAMS, a_batch, assert_close, moved, names_of


def test_token_masks():
    names = names_of("token-masks")
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embedding": jax.random.normal(keys[0], (11, 4)),
        "out": jax.random.normal(keys[1], (4, 11)),
    }
    tokens = jax.random.randint(keys[2], (4, 6), 0, 11)
    labels = jnp.roll(tokens, 1, 1).at[:, 4:].set(names["IGNORED"])
    batch, short = (
        {"tokens": tokens, "labels": labels},
        {"tokens": tokens[:, :4], "labels": labels[:, :4]},
    )
    tx = names["tx"]
    padded = names["step"](params, tx.init(params), batch)
    unpadded = names["step"](params, tx.init(params), short)
    assert_close(padded[:2], unpadded[:2])


def test_multi_label():
    names, batch = names_of("multi-label"), a_batch()
    batch |= {"y": (batch["x"][:, :3] > 0).astype(jnp.int32)}
    tx = names["tx"]
    params = jax.tree.map(lambda x: 20 * x, PARAMS)
    losses = names["perturbation_loss_fn"](params, batch)
    wrong = ((names["logits_of"](params, batch) > 0) != batch["y"]).mean(-1)
    assert (losses <= wrong + np.log(2) + 1e-5).all()
    _, updates, _ = names["step"](PARAMS, tx.init(PARAMS), batch)
    before, after = (
        names["loss_fn"](p, batch).mean() for p in (PARAMS, optax.apply_updates(PARAMS, updates))
    )
    assert after < before


def test_regression():
    names, batch = names_of("regression"), a_batch()
    params = {"w": PARAMS["w"], "v": jnp.ones((3, 1))}
    batch |= {"y": batch["x"][:, 0]}
    miss = jnp.abs(names["predict"](params, batch) - batch["y"])
    bound = names["perturbation_loss_fn"](params, batch)
    assert (bound <= (miss > names["TOLERANCE"])).all()
    tx = names["tx"]
    _, updates, _ = names["step"](params, tx.init(params), batch)
    assert moved(params, optax.apply_updates(params, updates)) > 0


def test_mixup():
    names, batch = names_of("mixup"), a_batch()
    mixed, tx = names["mixed_up"](jax.random.key(3), batch), names["tx"]
    _, updates, _ = names["step"](PARAMS, tx.init(PARAMS), mixed)
    assert moved(PARAMS, optax.apply_updates(PARAMS, updates)) > 0
    logits = names["logits_of"](PARAMS, mixed)
    share, classes = mixed["share"][:, None], jnp.eye(3)
    target = share * classes[mixed["y"]] + (1 - share) * classes[mixed["other"]]
    soft = names["soft_perturbation_loss"](logits, target)
    np.testing.assert_allclose(soft, names["mixed"](names["losses"][1])(PARAMS, mixed), **CLOSE)


def test_own_q():
    names, batch = names_of("own-q"), a_batch()
    params = jax.tree.map(lambda x: 20 * x, PARAMS)
    wrong = names["logits_of"](params, batch).argmax(-1) != batch["y"]
    assert (names["largest_margin"](params, batch) <= wrong).all()
    assert (names["perturbation_loss_fn"](params, batch) <= wrong + np.log(3) / 10 + 1e-6).all()
    _, updates, _ = names["step"](PARAMS, names["tx"].init(PARAMS), batch)
    assert moved(PARAMS, optax.apply_updates(PARAMS, updates)) > 0


def test_reinforcement_learning():
    names = names_of("reinforcement-learning")
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "w": 0.3 * jax.random.normal(keys[0], (8, 16)),
        "policy": 0.3 * jax.random.normal(keys[1], (16, 4)),
        "value": 0.3 * jax.random.normal(keys[2], (16, 1)),
    }
    observations = jax.random.normal(keys[3], (32, 8))
    actions = jax.random.randint(keys[4], (32,), 0, 4)
    log_p = jax.nn.log_softmax(names["network"](params, observations)[0])
    batch = {
        "observations": observations,
        "actions": actions,
        "log_p": jnp.take_along_axis(log_p, actions[:, None], axis=-1)[:, 0],
        "advantages": jax.random.normal(keys[5], (32,)),
        "returns": jnp.ones(32),
    }
    state, first = names["tx"].init(params), names["loss_fn"](params, batch).mean()
    for _ in range(20):
        _, updates, state = names["step"](params, state, batch)
        params = optax.apply_updates(params, updates)
    assert names["loss_fn"](params, batch).mean() < first
