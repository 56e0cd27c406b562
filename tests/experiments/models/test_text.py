"""Networks for texts: padding changes nothing, with every method."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import models
from experiments.config.methods import METHODS, PERTURBATIONS
from experiments.models.text import rotated
from experiments.step import train_step
from experiments.step.method import build_method
from tests.experiments.models.values import drawn, normal

LENGTHS = (5, 1, 6, 3, 4, 2, 6, 5)
VOCABULARY, CLASSES = 11, 3
SMALL = {
    "text-bag": {"width": 8},
    "text-transformer": {"width": 8, "heads": 2, "depth": 1},
}
LOSS = train_step.cross_entropy(0.1)


def tokens(length=6):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCABULARY, (len(LENGTHS), 6)).astype(np.uint16)
    ids[np.arange(6)[None] >= np.array(LENGTHS)[:, None]] = 0
    return jnp.asarray(np.pad(ids, ((0, 0), (0, length - 6))))


def batch_of(length):
    labels = jnp.arange(len(LENGTHS), dtype=jnp.int32) % CLASSES
    return train_step.Batch(tokens(length), labels, jnp.arange(len(LENGTHS)))


@functools.cache
def network(name, length):
    options = SMALL[name] | {"vocabulary": VOCABULARY}
    return models.create(name, (length,), CLASSES, 0, **options)


def trained(name, method, perturbation, length):
    """Losses and parameters of three steps."""
    apply, params, stats = network(name, length)
    values = METHODS[method].defaults | PERTURBATIONS[perturbation]
    if "num_samples" in values:
        values["num_samples"] = 2  # which compile faster than three
    built = build_method(
        method, perturbation, optax.sgd(0.1), values, batch_like=batch_of(length), key=1
    )
    state = train_step.init_state(params, stats, built, jax.random.key(2))
    step, losses = jax.jit(train_step.make_step(apply, built, LOSS)), []
    for _ in range(3):
        state, loss = step(state, batch_of(length))
        losses.append(loss)
    return losses, state.params


# With single examples, chosen examples, samples, states and whole updates.
EVERY = [("bisam-log", "log"), ("efficient", "ce"), ("sparse-fisher", "ce"), ("tilted", "ce")]
EVERY += [("look", "ce"), ("sampa", "tanh"), ("functional", "ce")]
IN_DEFAULT = ("bisam-log",)


@pytest.mark.parametrize(
    ("method", "perturbation"),
    [pytest.param(*one, marks=[] if one[0] in IN_DEFAULT else pytest.mark.slow) for one in EVERY],
)
def test_padding_changes_no_step(method, perturbation):
    """Padded to twice the length, a batch gives the same losses and parameters."""
    short, long = (trained("text-transformer", method, perturbation, n) for n in (6, 12))
    np.testing.assert_allclose(long[0], short[0], rtol=1e-6)
    chex.assert_trees_all_close(long[1], short[1], rtol=1e-5, atol=1e-6)
    assert np.isfinite(short[0]).all()
    assert abs(short[0][2] - short[0][0]) > 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_padding_changes_no_logits_and_no_gradient(name):
    def loss(params, length):
        apply, _, stats = network(name, length)
        logits, _ = apply(params, stats, tokens(length), train=True)
        return jnp.square(logits).sum(), logits

    _, params, _ = network(name, 6)
    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    short, long = gradient(params, 6), gradient(params, 12)
    chex.assert_trees_all_close(long, short, rtol=1e-5, atol=1e-6)
    assert np.isfinite(short[1]).all()
    # The padding's own vector is never used.
    np.testing.assert_array_equal(short[0]["embedding"]["embedding"][0], 0)


def test_the_order_of_the_tokens_matters_to_the_transformer_only():
    for name, matters in (("text-bag", False), ("text-transformer", True)):
        apply, params, stats = network(name, 6)
        params = drawn(params)
        whole = tokens()[2:3]
        logits = [apply(params, stats, x, train=False)[0] for x in (whole, whole[:, ::-1])]
        assert (np.abs(logits[0] - logits[1]).max() > 1e-3) == matters


def test_rotated_products_depend_on_the_distance():
    query, key = (jnp.tile(normal(1, 1, 2, 8, seed=seed), (1, 9, 1, 1)) for seed in (0, 1))
    products = jnp.einsum("bqhd,bkhd->hqk", rotated(query), rotated(key))
    for distance in range(-8, 9):
        diagonal = jnp.diagonal(products, distance, 1, 2)
        np.testing.assert_allclose(
            diagonal, diagonal[:, :1].repeat(9 - abs(distance), 1), rtol=1e-4, atol=1e-5
        )
    np.testing.assert_allclose(rotated(query)[:, 0], query[:, 0])
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated(query), axis=-1), jnp.linalg.norm(query, axis=-1), rtol=1e-5
    )


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_is_near(name):
    _, params, stats = network(name, 6)
    options = SMALL[name] | {"vocabulary": VOCABULARY}
    _, narrow = models.build(name, (6,), CLASSES, dtype=jnp.bfloat16, **options)
    apply, _, _ = network(name, 6)
    expected, found = (f(params, stats, tokens(), train=False)[0] for f in (apply, narrow))
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width", "depth"),
    [("text-transformer", 128, 2), ("text-transformer-small", 256, 4)],
)
def test_number_of_parameters(name, width, depth):
    init, _ = models.build(name, (128,), 8, vocabulary=8192)
    params, _ = jax.eval_shape(init, jax.random.key(0))
    block = 2 * 2 * width + 12 * width**2 + 9 * width
    expected = 8192 * width + depth * block + 2 * width + width * 8 + 8
    assert sum(x.size for x in jax.tree.leaves(params)) == expected
