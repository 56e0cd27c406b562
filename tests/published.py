"""The published numbers, and the networks they were made with."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
TOLERANCE = 1e-9


def assert_close(actual, expected, what: str, tolerance: float = TOLERANCE) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, what
    error = np.abs(actual - expected) / np.maximum(1, np.abs(expected))
    assert error.max() <= tolerance, f"{what}: {error.max():.2e}"


def tree_of(golden, prefix: str, step: int | None = None) -> dict:
    return {
        key.removeprefix(prefix + "/"): jnp.asarray(
            golden[key] if step is None else golden[key][step]
        )
        for key in golden.files
        if key.startswith(prefix + "/")
    }


def logits_and_stats(params: dict, x: jax.Array) -> tuple[jax.Array, dict]:
    """The golden networks; statistics of the batch as PyTorch counts them (unbiased variance)."""
    z = x @ params["W1"] + params["b1"][None]
    stats = {}
    if "gamma" in params:
        mean, variance = z.mean(0), z.var(0)
        stats = {"running_mean": mean, "running_var": variance * len(x) / (len(x) - 1)}
        z = (z - mean[None]) / jnp.sqrt(variance + 1e-5)[None]
        z = params["gamma"][None] * z + params["beta"][None]
    return jnp.tanh(z) @ params["W2"] + params["b2"][None], stats


def smooth_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """KL divergence from the smoothed labels, with off-class mass s / (K - 1)."""
    classes = logits.shape[-1]
    on = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
    target = on * (1 - smoothing) + (1 - on) * (smoothing / (classes - 1))
    divergence = jax.scipy.special.xlogy(target, target) - target * jax.nn.log_softmax(logits)
    return divergence.sum(-1)


def base_optimizer(hyperparameters: dict) -> optax.GradientTransformation:
    """SGD with weight decay and momentum, as in PyTorch."""
    return optax.chain(
        optax.add_decayed_weights(hyperparameters["weight_decay"]),
        optax.sgd(hyperparameters["lr"], momentum=hyperparameters["momentum"]),
    )
