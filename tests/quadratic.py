"""Two losses with gradients by hand, so that every sign, radius and norm can be worked out."""

import jax.numpy as jnp
import numpy as np
import pytest

# L(w) = w A w / 2 - b w, with gradient A w - b; Q(w) = c w, with gradient c.
A = np.array([[3.0, 1.0], [1.0, 2.0]])
B = np.array([1.0, -1.0])
C = np.array([-5.0, 12.0])
W = np.array([0.5, 2.0])


def quadratic(w):
    return 0.5 * w @ jnp.asarray(A) @ w - jnp.asarray(B) @ w


def linear(w):
    return jnp.asarray(C) @ w


def gradient(w):
    return A @ w - B


def unit(v):
    return v / np.linalg.norm(v)


def descent(tx, state=None, **extra_args):
    """An update at W, of L unless told otherwise."""
    state = tx.init(W) if state is None else state
    arguments = {"loss_fn": quadratic} | extra_args
    return tx.update(jnp.asarray(gradient(W)), state, jnp.asarray(W), **arguments)


# What is ascended, and its gradient at W.
each_ascent = pytest.mark.parametrize(
    ("q", "a"), [({}, gradient(W)), ({"perturbation_loss_fn": linear}, C)], ids=["sam", "bisam"]
)
