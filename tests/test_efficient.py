import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bisam_jax import efficient_sam, random_subset, sam, value_and_grad
from tests.compiled import quick_jit
from tests.problems import (
    loss_of_batch,
    mlp_batch,
    mlp_params,
    perturbation_loss_of_batch,
)
from tests.quadratic import W, descent, each_ascent, gradient, quadratic, unit

pytestmark = pytest.mark.usefixtures("float64")


def example_losses(w, indices):
    targets = jnp.array([[1.0, 0.0], [0.0, 3.0], [2.0, -2.0], [0.5, 2.5]])
    chosen = targets if indices is None else targets[indices]
    return 0.5 * jnp.sum((w[None] - chosen) ** 2, axis=-1)


@each_ascent
def test_efficient_on_a_quadratic(q, a):
    subset, beta = jnp.array([True, False]), 0.25
    point = W + 0.3 * unit(a) * [1, 0] / beta
    rise = np.asarray(example_losses(jnp.asarray(point), None) - example_losses(W, None))
    worst = np.sort(np.argsort(-rise)[:2])
    targets = np.array([[1.0, 0.0], [0.0, 3.0], [2.0, -2.0], [0.5, 2.5]])
    expected = point - targets[worst].mean(0)
    tx = efficient_sam(0.3, beta=beta, gamma=0.5)
    for losses in (None, example_losses(W, None)):
        grads, _ = descent(tx, subset=subset, example_losses_fn=example_losses, losses=losses, **q)
        np.testing.assert_allclose(grads, expected, rtol=1e-12)


@each_ascent
def test_efficient_with_everything_is_sam(q, a):
    tx = efficient_sam(0.3, beta=1.0, gamma=1.0)
    grads, _ = descent(tx, example_losses_fn=lambda w, indices: quadratic(w)[None], **q)
    np.testing.assert_allclose(grads, gradient(W + 0.3 * unit(a)), rtol=1e-12)


def test_random_subset_keeps_the_mean():
    tx = random_subset(0.25, key=3)
    eps = jnp.ones(10_000)
    kept, state = tx.update(eps, tx.init(eps))
    assert set(np.unique(kept)) == {0.0, 4.0}
    assert np.mean(kept) == pytest.approx(1.0, rel=0.1)
    other, _ = tx.update(eps, state)
    assert (kept != other).any()


PARAMS, BATCH = mlp_params(), mlp_batch()


@pytest.mark.parametrize("q", [None, perturbation_loss_of_batch], ids=["sam", "bisam"])
def test_efficient_through_value_and_grad(q):
    def losses(params, indices):
        part = BATCH if indices is None else jax.tree.map(lambda x: x[indices], BATCH)
        return jax.vmap(
            lambda x, y: loss_of_batch(params, {"x": x[None], "y": y[None]}), in_axes=(0, 0)
        )(part["x"], part["y"])

    tx = efficient_sam(0.3, beta=1.0, gamma=1.0)
    step = value_and_grad(tx, loss_of_batch, q)
    step = quick_jit(functools.partial(step, example_losses_fn=losses))
    _, grads, _ = step(PARAMS, tx.init(PARAMS), BATCH)
    plain = quick_jit(value_and_grad(sam(0.3), loss_of_batch, q))
    _, expected, _ = plain(PARAMS, sam(0.3).init(PARAMS), BATCH)
    chex.assert_trees_all_close(grads, expected, rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: efficient_sam(beta=0.0), ValueError, "beta must be finite, > 0, <= 1"),
        (lambda: efficient_sam(gamma=0.0), ValueError, "gamma must be finite, > 0, <= 1"),
        (lambda: efficient_sam(gamma=1.1), ValueError, "gamma must be finite"),
        (lambda: descent(efficient_sam()), ValueError, "example_losses_fn is missing"),
        (
            lambda: descent(efficient_sam(gamma=0.1), example_losses_fn=example_losses),
            ValueError,
            "gamma leaves no example to descend on, got gamma=0.1 for 4",
        ),
        (
            lambda: descent(efficient_sam(), example_losses_fn=lambda w, i: quadratic(w)),
            ValueError,
            "one loss an example",
        ),
        (
            lambda: descent(efficient_sam(), example_losses_fn=example_losses, subset=jnp.ones(3)),
            ValueError,
            "subset does not match params",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
