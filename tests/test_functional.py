import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import functional_sam, logits_loss, value_and_grad
from tests.problems import (
    losses_of_batch,
    mlp_batch,
    mlp_logits,
    mlp_params,
    perturbation_losses_of_batch,
)
from tests.quadratic import (
    GRADIENT,
    C,
    W,
    assert_takes_one_ball,
    descent,
    each_ball,
    gradient,
    linear,
)

pytestmark = pytest.mark.usefixtures("float64")

# z(w) = (w0 w1, w0^2, sin w1), h(z) = |z - T|^2 / 2, and L = h(z).
T = np.array([3.0, -1.0, 0.5])


def nonlinear(w):
    return jnp.stack([w[0] * w[1], w[0] ** 2, jnp.sin(w[1])])


def jacobian(w):
    return np.array([[w[1], w[0]], [2 * w[0], 0.0], [0.0, np.cos(w[1])]])


LOSS = logits_loss(nonlinear, lambda z: 0.5 * jnp.sum((z - jnp.asarray(T)) ** 2))
SLOPE = np.array([W[0] * W[1], W[0] ** 2, np.sin(W[1])]) - T
CLEAN = jacobian(W).T @ SLOPE


@each_ball
@pytest.mark.parametrize(
    "q",
    [{}, {"perturbation_loss_fn": linear}, {"perturbation_grads": C}],
    ids=["sam", "bisam", "bisam, by gradient"],
)
@pytest.mark.parametrize("grads", [CLEAN, None], ids=["grads", "no grads"])
def test_functional_by_hand(ball, eps, q, grads):
    expected = jacobian(W + eps(C if q else CLEAN)).T @ SLOPE
    actual, _ = descent(functional_sam(**ball), grads=grads, loss_fn=LOSS, **q)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_a_loss_that_knows_its_logits_is_a_plain_function():
    value, grads = jax.value_and_grad(LOSS)(jnp.asarray(W))
    np.testing.assert_allclose(value, 0.5 * SLOPE @ SLOPE, rtol=1e-12)
    np.testing.assert_allclose(grads, CLEAN, rtol=1e-12)


PARAMS = mlp_params(dtype=jnp.float32)
BATCH = mlp_batch()
RHO = 0.3


def in_float64(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x, tree
    )


@jax.jit
def explicit(params, batch, ascent):
    """The result is the Jacobian at the perturbed parameters, times the slope of the softmax."""
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(ascent)))
    point = jax.tree.map(lambda w, g: w + RHO * g / norm, params, ascent)
    probabilities = jax.nn.softmax(mlp_logits(params, batch["x"]))
    labels = jax.nn.one_hot(batch["y"], 3, dtype=probabilities.dtype)
    slope = (probabilities - labels) / len(labels)
    jac = jax.jacrev(lambda params: mlp_logits(params, batch["x"]))(point)
    return jax.tree.map(lambda j: jnp.tensordot(slope, j, 2), jac)


@jax.jit
def ascents(params, batch):
    """Returns the gradients of L and of Q."""
    return [
        jax.grad(lambda params, fn=fn: fn(params, batch).mean())(params)
        for fn in (losses_of_batch, perturbation_losses_of_batch)
    ]


def parts(size):
    return [
        jax.tree.map(lambda x, i=i: x[i : i + size], in_float64(BATCH)) for i in range(0, 16, size)
    ]


@pytest.mark.parametrize("bilevel", [False, True], ids=["sam", "bisam"])
@pytest.mark.parametrize(
    ("sizes", "group"),
    [
        pytest.param({}, 16, id="whole"),
        pytest.param({"microbatch_size": 4}, 16, id="microbatches", marks=pytest.mark.slow),
        pytest.param({"group_size": 8}, 8, id="groups", marks=pytest.mark.slow),
        pytest.param({"group_size": 4, "microbatch_size": 8}, 4, id="both", marks=pytest.mark.slow),
    ],
)
def test_a_network_against_its_explicit_jacobian(sizes, group, bilevel):
    params, batch = in_float64(PARAMS), in_float64(BATCH)
    tx = functional_sam(RHO)
    q = perturbation_losses_of_batch if bilevel else None
    step = jax.jit(value_and_grad(tx, losses_of_batch, q, **sizes))
    value, actual, _ = step(params, tx.init(params), batch)
    each = [explicit(params, part, ascents(params, part)[bilevel]) for part in parts(group)]
    expected = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *each)
    chex.assert_trees_all_close(actual, expected, rtol=1e-12, atol=1e-14)
    clean = perturbation_losses_of_batch if bilevel else losses_of_batch
    np.testing.assert_allclose(value, clean(params, batch).mean(), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"microbatch_size": 4}, {"group_size": 16}])
def test_aux_of_the_logits_function(sizes):
    def logits_fn(params, batch):
        logits = mlp_logits(params, batch["x"])
        return logits, {"logits": logits, "mean": logits.mean()}

    loss_fn = logits_loss(
        logits_fn,
        lambda logits, batch: optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, batch["y"]
        ),
    )
    tx = functional_sam(RHO)
    step = jax.jit(value_and_grad(tx, loss_fn, has_aux=True, **sizes))
    (value, aux), grads, _ = step(PARAMS, tx.init(PARAMS), BATCH)
    np.testing.assert_allclose(value, losses_of_batch(PARAMS, BATCH).mean(), rtol=1e-6)
    logits = mlp_logits(PARAMS, BATCH["x"])
    np.testing.assert_allclose(aux["logits"], logits, rtol=1e-5)
    np.testing.assert_allclose(aux["mean"], logits.mean(), rtol=1e-5)
    expected = explicit(PARAMS, BATCH, ascents(PARAMS, BATCH)[0])
    chex.assert_trees_all_close(grads, expected, rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"loss_fn": None},
        {"loss_fn": None, "grad_fn": gradient},
        {"loss_fn": LOSS, "grad_fn": gradient},
    ],
)
@pytest.mark.parametrize("grads", [GRADIENT, None], ids=["grads", "no grads"])
def test_the_loss_must_know_its_logits(arguments, grads):
    with pytest.raises(ValueError, match=r"pass loss_fn=bisam_jax.logits_loss\(logits_fn, loss\)"):
        descent(functional_sam(), grads=grads, **arguments)


def test_the_loss_must_know_its_logits_through_value_and_grad():
    tx = functional_sam()
    step = value_and_grad(tx, lambda w, batch: jnp.sum(w**2) * batch)
    with pytest.raises(ValueError, match=r"pass bisam_jax.logits_loss\(.*\) for loss_fn"):
        step(jnp.asarray(W), tx.init(W), jnp.ones(()))


def test_one_ball():
    assert_takes_one_ball(functional_sam)
