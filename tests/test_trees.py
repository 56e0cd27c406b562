import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import (
    adaptive_l2_ball,
    asam,
    bilateral_sam,
    friendly_sam,
    gsam,
    l2_ball,
    look_sam,
    sam,
    weighted_sam,
)
from bisam_jax._trees import fold

METHODS = {
    "sam": sam(),
    "asam": asam(),
    "gsam": gsam(),
    "bilateral": bilateral_sam(),
    "friendly": friendly_sam(),
    "look": look_sam(),
    "weighted": weighted_sam(),
    "adaptive gsam": gsam(perturbation=adaptive_l2_ball(0.5)),
}
PERTURBATIONS = {"l2 ball": l2_ball(0.05), "adaptive ball": adaptive_l2_ball(0.5)}


def loss_fn(params):
    return sum(0.5 * jnp.sum(w**2) for w in params)


def operations(tx, leaves, **extra_args):
    """Counts the binary maxima and sums in the compiled program of an update."""
    params = [jax.ShapeDtypeStruct((2, 3), jnp.float32)] * leaves
    state = jax.eval_shape(tx.init, params)
    update = jax.jit(functools.partial(tx.update, **extra_args))
    text = update.lower(params, state, params).compile().as_text()
    return np.array([len(re.findall(rf"\b{name}\(", text)) for name in ("maximum", "add")])


@pytest.mark.parametrize(
    ("tx", "extra_args"),
    [pytest.param(tx, {}, id=name) for name, tx in PERTURBATIONS.items()]
    + [
        pytest.param(tx, {"loss_fn": loss_fn}, id=name, marks=pytest.mark.slow)
        for name, tx in METHODS.items()
    ],
)
def test_a_program_is_as_long_as_there_are_leaves(tx, extra_args):
    """Twice the leaves take twice the operations, or XLA's time would grow quadratically."""
    few, many = (operations(tx, leaves, **extra_args) for leaves in (16, 32))
    assert (few > 0).all()
    assert (many <= 2.3 * few).all(), (few, many)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 17, 100])
def test_fold(number):
    values = np.random.default_rng(number).exponential(size=number).astype(np.float32)
    scalars = list(jnp.asarray(values))
    np.testing.assert_array_equal(fold(jnp.maximum, scalars), values.max())
    np.testing.assert_allclose(fold(jnp.add, scalars), values.sum(), rtol=1e-6)


def test_the_maximum_of_zeros():
    assert fold(jnp.maximum, [jnp.zeros([])] * 5) == 0


@pytest.mark.parametrize("number", [1, 3, 17])
def test_a_sum_is_differentiable(number):
    values = jnp.linspace(1.0, 2.0, number)

    def sum_of_squares(values):
        return fold(jnp.add, [value**2 for value in values])

    np.testing.assert_allclose(jax.grad(sum_of_squares)(values), 2 * values, rtol=1e-6)
    _, tangent = jax.jvp(sum_of_squares, (values,), (jnp.ones_like(values),))
    np.testing.assert_allclose(tangent, 2 * values.sum(), rtol=1e-6)


def test_a_norm_of_many_leaves():
    gradient = list(np.random.default_rng(0).normal(size=(64, 2, 3)).astype(np.float32))
    eps, _ = l2_ball(0.3).update(gradient, optax.EmptyState())
    expected = 0.3 * np.array(gradient) / np.linalg.norm(gradient)
    np.testing.assert_allclose(np.array(eps), expected, rtol=1e-5)


def test_a_second_update_outside_of_jit_compiles_nothing(caplog):
    tx, gradient = l2_ball(0.3), [jnp.ones(2)] * 3
    tx.update(gradient, optax.EmptyState())
    with jax.log_compiles():
        tx.update(gradient, optax.EmptyState())
    assert "Compiling" not in caplog.text
