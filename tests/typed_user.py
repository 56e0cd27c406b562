# pyright: reportUnnecessaryTypeIgnoreComment=true
"""What a user's type checker says: `pyright` passes annotated functions, and shows mistakes."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bisam_jax import bisam, logits_loss, value_and_grad


def loss_fn(params: dict[str, Array], batch: tuple) -> Array:
    return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)


def with_aux(params: dict[str, Array], batch: tuple) -> tuple[Array, Array]:
    return loss_fn(params, batch), batch[0] @ params["w"]


def logits_fn(params: dict[str, Array], batch: tuple) -> Array:
    return batch[0] @ params["w"]


def loss_of_logits(logits: Array, batch: tuple) -> Array:
    return jnp.mean((logits - batch[1]) ** 2)


def use(params: dict[str, Array], batch: tuple) -> Array:
    tx = optax.chain(bisam(0.1), optax.sgd(0.1))
    step = value_and_grad(tx, loss_fn, loss_fn)
    value, _updates, state = jax.jit(step)(params, tx.init(params), batch)
    value, _updates, state = step(params, state, batch)
    late = value_and_grad(bisam(0.1), with_aux, with_aux, has_aux=True, when=lambda i: i > 3)
    (late_value, logits), _grads, _ = late(params, bisam(0.1).init(params), batch, step=3)
    value_and_grad(bisam(0.1), logits_loss(logits_fn, loss_of_logits), loss_fn)
    step(params, state)  # pyright: ignore[reportCallIssue]
    step(params, state, bach=batch)  # pyright: ignore[reportCallIssue]
    value_and_grad(tx, loss_fn, perturbation_loss=loss_fn)  # pyright: ignore[reportCallIssue]
    return value + late_value + logits.sum()
