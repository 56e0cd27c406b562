"""Small problems with known answers, shared by the tests."""

import jax
import jax.numpy as jnp
import optax

from bisam_jax import perturbation_loss

CLASSES = 3


def mlp_params(seed: int = 0, dtype=jnp.float32) -> dict:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "hidden": {"w": jax.random.normal(keys[0], (4, 6), dtype), "b": jnp.full(6, 0.1, dtype)},
        "head": {
            "w": jax.random.normal(keys[1], (6, CLASSES), dtype),
            "b": jnp.linspace(-0.2, 0.3, CLASSES, dtype=dtype),
        },
    }


def mlp_batch(seed: int = 1, examples: int = 16) -> dict:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "x": jax.random.normal(keys[0], (examples, 4)),
        "y": jax.random.randint(keys[1], (examples,), 0, CLASSES),
    }


def mlp_logits(params: dict, x: jax.Array) -> jax.Array:
    x = x.astype(params["head"]["w"].dtype)
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return hidden @ params["head"]["w"] + params["head"]["b"][None]


def loss_of_batch(params: dict, batch: dict) -> jax.Array:
    """L: the cross-entropy."""
    logits = mlp_logits(params, batch["x"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def perturbation_loss_of_batch(params: dict, batch: dict) -> jax.Array:
    """Q: BiSAM's lower bound of the error."""
    logits = mlp_logits(params, batch["x"])
    return perturbation_loss(logits, batch["y"]).mean()


def global_norm(tree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
