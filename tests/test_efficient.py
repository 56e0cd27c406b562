import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bisam_jax import efficient_sam, sam, value_and_grad
from tests.problems import (
    loss_of_batch,
    losses_of_batch,
    mlp_batch,
    mlp_params,
    perturbation_loss_of_batch,
    perturbation_losses_of_batch,
)
from tests.quadratic import (
    C,
    W,
    assert_takes_one_ball,
    descent,
    each_ascent,
    each_ball,
    each_grads,
    gradient,
    quadratic,
)

pytestmark = pytest.mark.usefixtures("float64")

TARGETS = np.array([[1.0, 0.0], [0.0, 3.0], [2.0, -2.0], [0.5, 2.5]])
CLEAN = W - TARGETS.mean(0)


def example_losses_fn(w, indices):
    targets = jnp.asarray(TARGETS)
    chosen = targets if indices is None else targets[indices]
    return 0.5 * jnp.sum((w[None] - chosen) ** 2, axis=-1)


@each_ball
@each_ascent
@pytest.mark.parametrize("grads", [CLEAN, None], ids=["grads", "no grads"])
def test_efficient_on_a_quadratic(ball, eps, q, a, grads):
    subset, beta = np.array([True, False]), 0.25
    point = W + eps(C if q else CLEAN) * subset / beta
    before, after = (0.5 * ((w - TARGETS) ** 2).sum(-1) for w in (W, point))
    worst = np.argsort(before - after)[:2]
    expected = point - TARGETS[worst].mean(0)
    tx = efficient_sam(**ball, beta=beta, gamma=0.5)
    for example_losses in (None, before):
        actual, _ = descent(
            tx,
            grads=grads,
            loss_fn=None,
            subset=subset,
            example_losses_fn=example_losses_fn,
            example_losses=example_losses,
            **q,
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


@each_ball
@each_ascent
@each_grads
def test_efficient_with_everything_is_sam(ball, eps, q, a, grads):
    tx = efficient_sam(**ball, beta=1.0, gamma=1.0)
    actual, _ = descent(
        tx, grads=grads, example_losses_fn=lambda w, indices: quadratic(w)[None], **q
    )
    np.testing.assert_allclose(actual, gradient(W + eps(a)), rtol=1e-12)


def test_example_losses_are_what_the_rise_is_measured_from():
    tx = efficient_sam(0.3, beta=1.0, gamma=0.25)
    low = np.array([0.0, 0.0, -1e3, 0.0])
    arguments = {"example_losses_fn": example_losses_fn, "example_losses": low}
    actual, _ = descent(tx, grads=CLEAN, **arguments)
    point = W + 0.3 * CLEAN / np.linalg.norm(CLEAN)
    np.testing.assert_allclose(actual, point - TARGETS[2], rtol=1e-12)


PARAMS, BATCH = mlp_params(), mlp_batch()
EFFICIENT = efficient_sam(0.3, beta=1.0, gamma=1.0)


def examples(params, indices):
    part = BATCH if indices is None else jax.tree.map(lambda x: x[indices], BATCH)
    return losses_of_batch(params, part)


@pytest.mark.parametrize(
    ("losses", "given"),
    [
        ((losses_of_batch, perturbation_losses_of_batch), {}),
        ((loss_of_batch, perturbation_loss_of_batch), {"example_losses_fn": examples}),
    ],
    ids=["losses", "means"],
)
@pytest.mark.parametrize("bilevel", [False, True], ids=["sam", "bisam"])
def test_efficient_through_value_and_grad(losses, given, bilevel):
    loss_fn, q = losses if bilevel else (losses[0], None)
    step = jax.jit(functools.partial(value_and_grad(EFFICIENT, loss_fn, q), **given))
    _, grads, _ = step(PARAMS, EFFICIENT.init(PARAMS), BATCH)
    plain = jax.jit(value_and_grad(sam(0.3), loss_fn, q))
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
            lambda: descent(efficient_sam(gamma=0.1), example_losses_fn=example_losses_fn),
            ValueError,
            "gamma leaves no example to descend on, got gamma=0.1 for 4",
        ),
        (
            lambda: descent(efficient_sam(), example_losses_fn=lambda w, i: quadratic(w)),
            ValueError,
            "one loss per example",
        ),
        (
            lambda: descent(
                efficient_sam(),
                example_losses_fn=example_losses_fn,
                example_losses=jnp.ones((2, 2)),
            ),
            ValueError,
            "one loss per example",
        ),
        (
            lambda: descent(
                efficient_sam(), example_losses_fn=example_losses_fn, subset=jnp.ones(3)
            ),
            ValueError,
            "subset does not match params",
        ),
        (
            lambda: descent(efficient_sam(), example_losses_fn=example_losses_fn, grad_fn=gradient),
            ValueError,
            "loss_fn and grad_fn were both given",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_ball():
    assert_takes_one_ball(efficient_sam)
