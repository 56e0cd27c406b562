"""Small problems with known answers, shared by the tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bisam_jax import logits_loss, perturbation_loss

CLASSES = 3


def mlp_params(seed: int = 0, dtype=jnp.float32) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "hidden": {
            "w": jnp.asarray(rng.normal(size=(4, 6)), dtype),
            "b": jnp.asarray(np.full(6, 0.1), dtype),
        },
        "head": {"w": jnp.asarray(rng.normal(size=(6, CLASSES)), dtype)},
    }


def mlp_batch(seed: int = 1, examples: int = 16) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "x": jnp.asarray(rng.normal(size=(examples, 4)), jnp.float32),
        "y": jnp.asarray(rng.integers(0, CLASSES, examples), jnp.int32),
    }


def mlp_logits(params: dict, x: jax.Array) -> jax.Array:
    x = x.astype(params["head"]["w"].dtype)
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return hidden @ params["head"]["w"]


def logits_of_batch(params: dict, batch: dict) -> jax.Array:
    return mlp_logits(params, batch["x"])


def cross_entropy(logits: jax.Array, batch: dict) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


# L per example: the cross-entropy, split at the logits for the method that needs them.
losses_of_batch = logits_loss(logits_of_batch, cross_entropy)
# Mean of L.
loss_of_batch = logits_loss(
    logits_of_batch, lambda logits, batch: cross_entropy(logits, batch).mean()
)


def perturbation_losses_of_batch(params: dict, batch: dict) -> jax.Array:
    """Q per example: BiSAM's lower bound of the error."""
    return perturbation_loss(logits_of_batch(params, batch), batch["y"])


def perturbation_loss_of_batch(params: dict, batch: dict) -> jax.Array:
    """Q: the mean over the batch."""
    return perturbation_losses_of_batch(params, batch).mean()


def global_norm(tree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


@functools.cache
def with_aux(fn):
    def fn_with_aux(params, batch):
        logits = mlp_logits(params, batch["x"])
        aux = {"logits": logits, "mean": logits.mean(), "per class": logits.mean(0)}
        return fn(params, batch), aux

    return fn_with_aux
