"""Arguments that `update` of every method refuses, and the messages."""

import jax
import jax.numpy as jnp
import pytest

from tests.methods import METHODS, arguments_of, loss_of_params
from tests.problems import mlp_batch, mlp_params, perturbation_loss_of_batch

TAKING_GRAD_FN = {name: method for name, method in METHODS.items() if method.takes_grad_fn}
PARAMS, BATCH = mlp_params(), mlp_batch()
loss_fn = loss_of_params(BATCH)


def perturbation_loss_fn(params):
    return perturbation_loss_of_batch(params, BATCH)


GRADS = jax.grad(loss_fn)(PARAMS)
GRADS_OF_Q = jax.grad(perturbation_loss_fn)(PARAMS)

ERRORS = [
    ({"params": None}, ValueError, "params is missing"),
    ({"loss_fn": None}, ValueError, "exactly one of loss_fn .* got neither"),
    ({"grad_fn": jax.grad(loss_fn)}, ValueError, "exactly one of loss_fn .* got both"),
    (
        {"perturbation_grads": GRADS_OF_Q},
        ValueError,
        "at most one of perturbation_loss_fn .* and perturbation_grads .* got both",
    ),
    (
        {"loss_fn": lambda p: p["hidden"]["b"]},
        TypeError,
        r"loss_fn must return one real floating scalar, got float32\[6\]",
    ),
    ({"loss_fn": lambda p: (loss_fn(p), 1)}, TypeError, "loss_fn must return one real"),
    ({"loss_fn": lambda p: None}, TypeError, "loss_fn must return one real"),
    ({"loss_fn": lambda p: 1}, TypeError, "loss_fn must return one real"),
    (
        {"perturbation_loss_fn": lambda p: p["hidden"]["b"]},
        TypeError,
        "perturbation_loss_fn must return one real",
    ),
    (
        {"loss_fn": None, "grad_fn": lambda p: p["head"]},
        ValueError,
        "the output of grad_fn does not match params",
    ),
    (
        {"params": jax.tree.map(lambda p: p.astype(jnp.complex64), PARAMS)},
        TypeError,
        "complex parameters are not supported",
    ),
    (
        {"perturbation_loss_fn": None, "perturbation_grads": GRADS["hidden"]},
        ValueError,
        "perturbation_grads does not match params",
    ),
]
# Errors even if the method does not use `grads`.
ERRORS_OF_GRADS = [
    (
        {"grads": {"hidden": tuple(GRADS["hidden"].values()), "head": GRADS["head"]}},
        ValueError,
        r"grads does not match params: no leaf at \['hidden'\]\['b'\]",
    ),
    (
        {"params": [PARAMS["hidden"]["w"]], "grads": (GRADS["hidden"]["w"],)},
        ValueError,
        "grads does not match params: its containers are",
    ),
    (
        {"grads": {"hidden": GRADS["hidden"]}},
        ValueError,
        r"grads does not match params: no leaf at \['head'\]\['w'\]",
    ),
    (
        {"grads": {**GRADS, "more": jnp.zeros(1)}},
        ValueError,
        r"grads does not match params, which has no leaf at \['more'\]",
    ),
    (
        {"grads": jax.tree.map(lambda g: g[None], GRADS)},
        ValueError,
        r"grads does not match params: shape \(1, 6, 3\) at \['head'\]\['w'\]",
    ),
]


@pytest.mark.parametrize(
    ("method", "change", "error", "message"),
    [(method, *case) for method in TAKING_GRAD_FN.values() for case in ERRORS + ERRORS_OF_GRADS],
)
def test_errors(method, change, error, message):
    tx = method.make(rho=0.1)
    arguments = arguments_of(BATCH, q="function" if method.needs_clean or method.needs_q else None)
    if "perturbation_grads" in change:
        arguments["perturbation_loss_fn"] = perturbation_loss_fn
    arguments |= {"grads": GRADS, "params": PARAMS} | change
    grads, params = arguments.pop("grads"), arguments.pop("params")
    state = tx.init(PARAMS)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: tx.update(grads, state, params, **arguments))
