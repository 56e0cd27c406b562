"""LoRA: the model at its start, its updates, and the model that they are merged into."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models.lora import LORA, with_lora, without_lora
from experiments.models.trees import flat, nested

KEY = jax.random.key(0)
TOKENS = jnp.asarray([[1, 2, 3, 0], [4, 1, 0, 0]], jnp.uint16)
SIZES = {"vocabulary": 7, "width": 8, "heads": 2, "depth": 1}


@pytest.fixture(scope="module")
def built():
    return models.build("text-transformer", (4,), 3, **SIZES)


def test_every_linear_layer_but_the_last_has_an_update(built):
    params, _ = with_lora(*built, 2)[0](KEY)
    kernels = {
        path[:-1]: leaf.shape
        for path, leaf in flat(built[0](KEY)[0]).items()
        if path[-1] == "kernel" and path[0] != "head"
    }
    updates = flat(params[LORA])
    assert {path[:-1] for path in updates} == set(kernels)
    assert len(kernels) == 4
    for path, (n_in, n_out) in kernels.items():
        a, b = updates[(*path, "a")], updates[(*path, "b")]
        assert (a.shape, b.shape) == ((n_in, 2), (2, n_out))
        np.testing.assert_array_equal(b, 0)
        assert 0.3 / np.sqrt(n_in) < np.abs(a).mean() < 0.7 / np.sqrt(n_in)
        assert np.abs(a).max() <= 1 / np.sqrt(n_in)


def test_at_the_start_it_is_the_same_model_and_then_that_of_the_merged_kernels(built):
    init, apply = with_lora(*built, 2)
    params, stats = init(KEY)
    plain, _ = built[0](KEY)
    logits, _ = built[1](plain, stats, TOKENS, train=False)
    np.testing.assert_array_equal(apply(params, stats, TOKENS, train=False)[0], logits)

    path = ("blocks", 0, "widen")
    leaves = flat(params)
    leaves[(LORA, *path, "b")] += 0.5
    moved, _ = apply(nested(leaves), stats, TOKENS, train=False)
    assert np.abs(moved - logits).max() > 1e-4
    kernel = plain["blocks"][0]["widen"]["kernel"] + leaves[(LORA, *path, "a")].sum(1)[:, None] / 2
    whole = nested(without_lora(leaves))
    np.testing.assert_allclose(whole["blocks"][0]["widen"]["kernel"], kernel, rtol=1e-5)
    assert jax.tree.structure(whole) == jax.tree.structure(plain)
    chex.assert_trees_all_close(built[1](whole, stats, TOKENS, train=False)[0], moved, rtol=1e-5)


def test_a_model_without_linear_layers():
    init, _ = with_lora(*models.build("resnet8", (8, 8, 1), 10), 2)
    with pytest.raises(ValueError, match="no linear layer"):
        jax.eval_shape(init, KEY)
