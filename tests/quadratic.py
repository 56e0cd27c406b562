"""Two losses with gradients by hand, so every sign, radius and norm can be computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from bisam_jax import adaptive_l2_ball

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


def l2_eps(a, w=W):
    return 0.3 * unit(a)


def adaptive_eps(a, w=W):
    size = np.abs(w) + 0.1
    return 0.3 * size**2 * a / np.linalg.norm(size * a)


GRADIENT = gradient(W)


def descent(tx, state=None, *, grads=GRADIENT, **extra_args):
    """Returns an update at W, for the loss L by default."""
    state = tx.init(W) if state is None else state
    grads = None if grads is None else jnp.asarray(grads)
    arguments = {"loss_fn": quadratic} | extra_args
    return tx.update(grads, state, jnp.asarray(W), **arguments)


# Arguments for the ascended loss, and its gradient at W.
each_ascent = pytest.mark.parametrize(
    ("q", "a"),
    [
        pytest.param({}, GRADIENT, id="sam"),
        pytest.param({"perturbation_loss_fn": linear}, C, id="bisam"),
        pytest.param({"perturbation_grads": C}, C, id="bisam, by gradient"),
    ],
)

# Whether the gradient of L is passed.
each_grads = pytest.mark.parametrize("grads", [GRADIENT, None], ids=["grads", "no grads"])

# Arguments of a method that set its ball, and the function from the ascent gradient to eps.
each_ball = pytest.mark.parametrize(
    ("ball", "eps"),
    [
        ({"rho": 0.3}, l2_eps),
        ({"perturbation": adaptive_l2_ball(0.3, eta=0.1)}, adaptive_eps),
    ],
    ids=["ball", "adaptive ball"],
)


def assert_takes_one_ball(make, **radius):
    """Checks that `make` refuses two balls at once, and an object that is no ball."""
    radius = radius or {"rho": 0.3}
    (name,) = radius
    with pytest.raises(ValueError, match=f"{name} and perturbation were both given"):
        make(**radius, perturbation=adaptive_l2_ball(0.3))
    with pytest.raises(TypeError, match="perturbation must be an optax transformation"):
        make(perturbation=0.3)
