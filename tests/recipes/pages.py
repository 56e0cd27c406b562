"""The code of a recipe, and what its tests compare it with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bisam_jax
from tests.documents import code_of

PARAMS = {"w": 0.1 * jax.random.normal(jax.random.key(1), (8, 3)), "b": jnp.zeros(3)}
TWO_LAYERS = {
    "w": 0.3 * jax.random.normal(jax.random.key(2), (8, 16)),
    "v": 0.1 * jnp.ones((16, 3)),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def names_of(page):
    """What the code of a page defines."""
    names = {}
    exec(code_of(f"docs/recipes/{page}.md"), names)
    return names


def a_batch(examples=64):
    """Points in eight dimensions, of three classes."""
    x = jax.random.normal(jax.random.key(0), (examples, 8))
    return {"x": x, "y": (x[:, :2] > 0).sum(1)}


def softmax_losses(params, batch):
    logits = batch["x"] @ params["w"] + params["b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def q(params, batch):
    return bisam_jax.perturbation_loss(batch["x"] @ params["w"] + params["b"], batch["y"])


def reference(params, batch, method, base, *losses):
    """Returns the parameters after one step of a method and its base optimizer."""
    tx = optax.chain(method, base)
    step = bisam_jax.value_and_grad(tx, *losses)
    return optax.apply_updates(params, step(params, tx.init(params), batch)[1])


def after_bisam(batch):
    base = optax.sgd(0.1, momentum=0.9)
    return reference(PARAMS, batch, bisam_jax.bisam(0.05), base, softmax_losses, q)


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours, theirs)


def moved(before, after):
    return float(optax.tree.norm(optax.tree.sub(after, before)))
