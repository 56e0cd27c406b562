"""Checks that two ways give one result, for the tests of single methods."""

import functools

import chex
import jax
import optax

from bisam_jax import sam
from tests.problems import (
    loss_of_batch,
    mlp_batch,
    mlp_params,
)

PARAMS, BATCH = mlp_params(), mlp_batch()


def batch_loss(params):
    return loss_of_batch(params, BATCH)


def largest_weights(params):
    """Stands in for Fisher scores."""
    return params


@functools.partial(jax.jit, static_argnames="tx")
def update(tx, state, params):
    return tx.update(
        jax.grad(batch_loss)(params),
        state,
        params,
        loss_fn=batch_loss,
        fisher_scores_fn=largest_weights,
    )


SAM = sam(0.3)


def assert_is_sam(tx):
    """Checks that the first two steps of `tx` are those of SAM with a radius of 0.3."""
    state = tx.init(PARAMS)
    for scale in (1.0, 0.5):
        params = optax.tree.scale(scale, PARAMS)
        actual, state = update(tx, state, params)
        expected, _ = update(SAM, SAM.init(params), params)
        chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=1e-6)
