import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bisam_jax._top_k import top_k_mask

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("k", [0, 1, 7, 50, 100])
def test_top_k_mask_is_exact_over_all_leaves(k, dtype):
    rng = np.random.default_rng(0)
    flat = rng.exponential(size=100).astype(dtype)
    flat[rng.integers(0, 100, 30)] = flat[3]  # ties
    scores = {"a": jnp.asarray(flat[:40].reshape(4, 10)), "b": (jnp.asarray(flat[40:]),)}
    mask = jax.jit(top_k_mask)(scores, k)
    got = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(mask)])
    order = np.lexsort((np.arange(100), -flat))
    expected = np.zeros(100, bool)
    expected[order[:k]] = True
    np.testing.assert_array_equal(got, expected)


def test_top_k_mask_of_zeros_and_of_nothing():
    assert top_k_mask(jnp.zeros(5), 2).tolist() == [True, True, False, False, False]
    assert top_k_mask({}, 0) == {}


@pytest.mark.slow
def test_masks_over_sharded_parameters():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    scores = {"a": jax.random.uniform(jax.random.key(0), (64, 3)), "b": jnp.ones(8)}
    expected = top_k_mask(scores, 50)
    sharded = jax.jit(top_k_mask)(jax.device_put(scores, sharding), 50)
    chex.assert_trees_all_equal(jax.device_get(sharded), jax.device_get(expected))
