import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bisam_jax import look_sam
from tests.equivalences import assert_is_sam
from tests.quadratic import (
    W,
    assert_takes_one_ball,
    each_ascent,
    each_ball,
    gradient,
    linear,
    quadratic,
    unit,
)

pytestmark = pytest.mark.usefixtures("float64")

RATE, STEPS = 0.1, 8
called = []


def noted(name, fn):
    """Returns `fn`, with a note of every evaluation at run time."""

    def noted_fn(w):
        jax.debug.callback(lambda: called.append(name))
        return fn(w)

    return noted_fn


LOSSES = {"loss_fn": noted("L", quadratic)}
Q = noted("Q", linear)


@functools.partial(jax.jit, static_argnames=("tx", "kind", "given"))
def step(tx, state, w, g, c, kind, given):
    q = {"function": {"perturbation_loss_fn": Q}, "gradient": {"perturbation_grads": c}, None: {}}
    return tx.update(g if given else None, state, w, **LOSSES, **q[kind])


@each_ball
@each_ascent
@pytest.mark.parametrize("given", [True, False], ids=["grads", "no grads"])
def test_look_on_a_quadratic(ball, eps, q, a, given):
    """Checks the gradients, the points where they are taken, and that no other is computed."""
    kind = {"perturbation_loss_fn": "function", "perturbation_grads": "gradient"}
    kind = kind[next(iter(q))] if q else None
    tx = look_sam(**ball, alpha=0.7, k=3)
    w, state = W, tx.init(W)
    for t in range(STEPS):
        g = gradient(w)
        expected_calls = [] if given else ["L"]
        if t % 3 == 0:
            p = gradient(w + eps(a if q else g, w))
            v = p - (p @ g) / (g @ g) * g
            expected = p
            expected_calls += ["L", "Q"] if kind == "function" else ["L"]
        else:
            expected = g + 0.7 * np.linalg.norm(g) / np.linalg.norm(v) * v
        called.clear()
        actual, state = step(tx, state, jnp.asarray(w), jnp.asarray(g), a, kind, given)
        jax.effects_barrier()
        assert sorted(called) == expected_calls, t
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
        w = w - RATE * expected


def test_a_schedule_counts_perturbations():
    tx = look_sam(lambda count: jnp.where(count < 1, 0.2, 0.4), k=3)
    update = jax.jit(functools.partial(tx.update, loss_fn=quadratic))
    state = tx.init(W)
    for t in range(7):
        actual, state = update(None, state, jnp.asarray(W))
        if t % 3 == 0:
            expected = gradient(W + (0.4 if t else 0.2) * unit(gradient(W)))
            np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("q", [None, linear], ids=["sam", "bisam"])
def test_without_a_radius_it_is_the_plain_gradient(q):
    tx = look_sam(0.0, k=3)
    plain = jax.jit(jax.grad(quadratic))
    update = jax.jit(functools.partial(tx.update, loss_fn=quadratic, perturbation_loss_fn=q))
    w, state = jnp.asarray(W), tx.init(W)
    for _ in range(STEPS):
        actual, state = update(None, state, w)
        chex.assert_trees_all_equal(actual, plain(w))
        w = w - RATE * actual


def test_with_every_gradient_perturbed_it_is_sam():
    assert_is_sam(look_sam(0.3, k=1))


def test_with_alpha_zero_it_is_the_plain_gradient_in_between():
    tx = look_sam(0.3, alpha=0.0, k=2)
    update = jax.jit(functools.partial(tx.update, loss_fn=quadratic))
    _, state = update(None, tx.init(W), jnp.asarray(W))
    actual, _ = update(None, state, jnp.asarray(W))
    np.testing.assert_array_equal(actual, gradient(W))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: look_sam(alpha=-1.0), ValueError, "alpha must be finite, >= 0"),
        (lambda: look_sam(k=0), ValueError, "k must be finite, >= 1, got 0"),
        (lambda: look_sam(k=2.0), TypeError, "k must be an integer"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_ball():
    assert_takes_one_ball(look_sam)
