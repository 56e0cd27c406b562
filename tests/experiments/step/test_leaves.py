"""Which leaves are perturbed and trained, against steps computed by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import models
from experiments.config.methods import METHODS
from experiments.models.trees import flat, nested
from experiments.step import train_step
from experiments.step.leaves import TrainedPart, are_matrices, are_norms, matches
from experiments.step.method import build_method

KEY = jax.random.key(0)
TREE = {
    "embedding": {"embedding": np.ones((5, 4))},
    "blocks": {
        0: {
            "norm": {"scale": np.ones(4), "bias": np.ones(4)},
            "widen": {"kernel": np.ones((4, 8)), "bias": np.ones(8)},
            "convolution": {"kernel": np.ones((3, 3, 4, 4))},
        }
    },
    "positions": np.ones((1, 5, 4)),
}
RHO, RATE = 0.3, 0.1
LOSS = train_step.cross_entropy(0.1)


def chosen(mask):
    return {".".join(map(str, path)) for path, is_chosen in flat(mask).items() if is_chosen}


def test_matrices_and_norms():
    assert chosen(are_matrices(TREE)) == {"blocks.0.widen.kernel", "blocks.0.convolution.kernel"}
    assert chosen(are_norms(TREE)) == {"blocks.0.norm.scale", "blocks.0.norm.bias"}
    chex.assert_trees_all_equal(nested(flat(TREE)), TREE)


def test_patterns_match_names_and_what_is_below_them():
    path = ("blocks", 0, "norm", "scale")
    assert matches(path, "blocks")
    assert matches(path, "head,blocks.0")
    assert matches(path, "*scale")
    assert not matches(path, "block")
    assert not matches(path, "norm")
    assert not matches(path, "")


@pytest.fixture(scope="module")
def network():
    apply, params, stats = models.create("mlp", (8, 8, 1), 10, 0, width=8)
    images = jax.random.normal(KEY, (16, 8, 8, 1))
    labels = jnp.arange(16, dtype=jnp.int32) % 10
    return apply, params, stats, train_step.Batch(images, labels, labels)


def step_of(network, name, perturb="all", trained=train_step.ALL, **values):
    """The parameters after a step of size RATE, as the descent gradient."""
    apply, params, stats, batch = network
    values = METHODS[name].defaults | {"rho": RHO} | values
    method = build_method(name, "ce", optax.sgd(RATE), values, perturb=perturb)
    state = train_step.init_state(params, stats, method, KEY, trained)
    step = train_step.make_step(apply, method, LOSS, trained=trained)
    new = jax.jit(step)(state, batch)[0].params
    return jax.tree.map(lambda old, new: (old - new) / RATE, params, new)


def gradient_of(network, params):
    apply, _, stats, batch = network

    def loss(params):
        return LOSS(apply(params, stats, batch.images, train=True)[0], batch.labels).mean()

    return jax.grad(loss)(params)


@pytest.mark.parametrize(
    ("name", "perturb", "where"),
    [
        ("sam", "norms", are_norms),
        pytest.param("asam", "matrices", are_matrices, marks=pytest.mark.slow),
        pytest.param("gsam", "norms", are_norms, marks=pytest.mark.slow),
    ],
    ids=["sam", "asam", "gsam"],
)
def test_only_some_leaves_are_perturbed_and_all_are_trained(network, name, perturb, where):
    params = network[1]
    gradient = jax.tree.map(
        lambda g, there: g if there else jnp.zeros_like(g),
        gradient_of(network, params),
        where(params),
    )
    sizes = jax.tree.map(lambda w: jnp.abs(w) + 0.01 if name == "asam" else 1.0, params)
    scaled = jax.tree.map(jnp.multiply, sizes, gradient)
    eps = jax.tree.map(lambda t, s: RHO * t * s / optax.tree.norm(scaled), sizes, scaled)
    expected = gradient_of(network, optax.tree.add(params, eps))
    values = {"gsam_alpha": 0.0} if name == "gsam" else {}
    got = step_of(network, name, perturb, **values)
    chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-5)
    assert optax.tree.norm(eps) > 0
    plain = step_of(network, name, **values)
    assert optax.tree.norm(optax.tree.sub(got, plain)) > 1e-3


def test_frozen_leaves_stay_and_are_not_perturbed(network):
    """The step is that of a network in which the frozen leaves are constants."""
    params = network[1]
    trained = TrainedPart(params, lambda path: path[0] == "head" or path[-1] == "bias")
    own, whole = trained.of(params), gradient_of(network, params)
    assert 0 < len(jax.tree.leaves(own)) < len(jax.tree.leaves(params))
    gradient = trained.of(whole)
    eps = jax.tree.map(lambda g: RHO * g / optax.tree.norm(gradient), gradient)
    moved = trained.into(params, optax.tree.add(own, eps))
    got = step_of(network, "sam", trained=trained)
    expected = trained.of(gradient_of(network, moved))
    chex.assert_trees_all_close(trained.of(got), expected, rtol=1e-3, atol=1e-5)
    frozen = {path: leaf for path, leaf in flat(got).items() if path not in flat(own)}
    assert frozen
    for leaf in frozen.values():
        np.testing.assert_array_equal(leaf, 0)
    method = build_method("gsam", "ce", optax.adam(1.0), METHODS["gsam"].defaults)
    state = train_step.init_state(params, {}, method, KEY, trained)
    assert jax.tree.structure(state.optimizer[0].mu) == jax.tree.structure(own)
