"""Recipes for a perturbation or a method of your own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bisam_jax
from tests.recipes.pages import CLOSE, PARAMS, a_batch, assert_close, names_of, q, softmax_losses


def test_own_perturbation():
    names, batch = names_of("own-perturbation"), a_batch()
    grads = jax.grad(lambda p: softmax_losses(p, batch).mean())(PARAMS)
    cube, _ = names["maximum_ball"](0.005).update(grads, optax.EmptyState(), PARAMS)
    assert {float(x) for x in jnp.abs(cube["w"]).ravel()} == {np.float32(0.005)}
    per_layer, _ = names["ball_per_layer"](0.05).update(grads, optax.EmptyState(), PARAMS)
    for leaf in per_layer.values():
        np.testing.assert_allclose(jnp.linalg.norm(leaf), 0.05, **CLOSE)
    tx = optax.chain(names["method"], optax.sgd(0.1))
    _, updates, _ = names["step"](PARAMS, tx.init(PARAMS), batch)
    eps = jax.tree.map(jnp.sign, jax.grad(lambda p: q(p, batch).mean())(PARAMS))
    point = jax.tree.map(lambda w, e: w + 0.005 * e, PARAMS, eps)
    expected = jax.grad(lambda p: softmax_losses(p, batch).mean())(point)
    assert_close(updates, jax.tree.map(lambda g: -0.1 * g, expected))


def test_own_method():
    names, batch = names_of("own-method"), a_batch()
    tx, losses = names["tx"], names["losses"]
    for step, given, sharp in (
        (names["plain"], losses[:1], bisam_jax.sam(0.05)),
        (names["bilevel"], losses, bisam_jax.bisam(0.05)),
    ):
        _, updates, _ = step(PARAMS, tx.init(PARAMS), batch)
        perturbed = bisam_jax.value_and_grad(sharp, *given)(PARAMS, sharp.init(PARAMS), batch)[1]
        clean = jax.grad(lambda p: losses[0](p, batch).mean())(PARAMS)
        half = jax.tree.map(lambda g, p: (g + p) / 2, clean, perturbed)
        base = optax.adamw(1e-2)
        assert_close(updates, base.update(half, base.init(PARAMS), PARAMS)[0])
