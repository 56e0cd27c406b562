"""Recipes for a framework: Flax, Equinox, Keras, loops of others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bisam_jax
from tests.recipes.pages import (
    PARAMS,
    a_batch,
    assert_close,
    moved,
    names_of,
    q,
    reference,
    softmax_losses,
)


def test_nnx():
    names, batch = names_of("nnx"), a_batch()
    carry = [names[name] for name in ("params", "stats", "rngs", "state", "optimizer_state")]
    first, values = carry, []
    for _ in range(30):
        *carry, value = names["train_step"](*carry, batch)
        values.append(value)
    assert values[-1] < 0.5 * values[0]
    assert moved(first[1], carry[1]) > 0  # batch statistics
    counts = [
        [leaf for leaf in jax.tree.leaves(c[2]) if leaf.dtype == jnp.uint32] for c in (first, carry)
    ]
    assert counts[0] != counts[1]  # another step draws other masks
    assert both_passes_draw_the_same(names, first, batch)


def both_passes_draw_the_same(names, carry, batch):
    """Returns whether the step is that of the network with the first step's masks."""
    params, stats, rngs, *_ = carry
    nnx, graphdef = names["nnx"], names["graphdef"]

    def of_logits(loss):
        def fn(params, batch):
            net = nnx.merge(graphdef, params, stats, rngs, copy=True)
            return loss(net(batch["x"]), batch["y"]).mean()

        return fn

    cross_entropy = of_logits(optax.losses.softmax_cross_entropy_with_integer_labels)
    eps = jax.grad(of_logits(bisam_jax.perturbation_loss))(params, batch)
    norm = optax.tree.norm(eps)
    point = jax.tree.map(lambda w, e: w + 0.05 * e / norm, params, eps)
    grads = jax.grad(cross_entropy)(point, batch)
    updates, _ = names["optimizer"].update(grads, carry[4], params)
    expected = optax.apply_updates(params, updates)
    ours = names["train_step"](*carry, batch)[0]
    return moved(expected, ours) < 1e-3 * moved(params, ours)


def test_linen():
    names, batch = names_of("linen"), a_batch()
    state, values = names["state"], []
    for _ in range(30):
        state, value = names["train_step"](state, batch)
        values.append(value)
    assert values[-1] < 0.5 * values[0]
    assert state.step == 30


def test_equinox():
    names, batch = names_of("equinox"), a_batch()
    carry, values = [names[name] for name in ("params", "state", "optimizer_state")], []
    for _ in range(30):
        *carry, value = names["train_step"](*carry, batch)
        values.append(value)
    assert values[-1] < 0.5 * values[0]
    model = names["eqx"].combine(carry[0], names["static"])
    assert jax.vmap(model)(batch["x"]).shape == (64, 3)


@pytest.mark.filterwarnings("default")  # of Keras
def test_keras():
    names, batch = names_of("keras"), a_batch()
    model = names["model"]
    x, y = np.asarray(batch["x"]), np.asarray(batch["y"], np.int32)
    history = model.fit(x, y, epochs=20, batch_size=32, verbose=0).history["perturbation_loss"]
    assert history[-1] < 0.5 * history[0]
    assert (model.predict(x, verbose=0).argmax(-1) == y).mean() > 0.8


def test_gradient_loops():
    jaxopt = pytest.importorskip("jaxopt")
    names, batch = names_of("gradient-loops"), a_batch()
    solver = jaxopt.OptaxSolver(
        opt=optax.adam(1e-2), fun=names["value_and_gradient"], value_and_grad=True
    )
    state = solver.init_state(PARAMS, batch=batch)
    params, _ = solver.update(PARAMS, state, batch=batch)
    assert_close(
        params, reference(PARAMS, batch, bisam_jax.bisam(0.05), optax.adam(1e-2), softmax_losses, q)
    )


def test_from_optax_sam():
    names, batch = names_of("from-optax-sam"), a_batch()
    before, after = names["before"], names["after"]
    theirs, _ = names["step_before"](PARAMS, before.init(PARAMS), batch)
    _, ours, _ = names["step_after"](PARAMS, after.init(PARAMS), batch)
    assert_close(ours, theirs)
