import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bisam_jax import random_subset


def test_it_keeps_the_mean():
    tx = random_subset(0.25, key=3)
    eps = jnp.ones(10_000)
    kept, state = tx.update(eps, tx.init(eps))
    assert set(np.unique(kept)) == {0.0, 4.0}
    assert np.mean(kept) == pytest.approx(1.0, rel=0.1)
    other, _ = tx.update(eps, state)
    assert (kept != other).any()


def test_a_given_subset():
    tx = random_subset(0.25)
    eps = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    subset = {"a": jnp.array([False, True]), "b": jnp.array(True)}
    kept, _ = tx.update(eps, tx.init(eps), subset=subset)
    np.testing.assert_array_equal(kept["a"], [0.0, -8.0])
    assert kept["b"] == 12.0


@pytest.mark.parametrize("beta", [0.0, 1.5, float("nan")])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match="beta must be finite, > 0, <= 1"):
        random_subset(beta)


def test_a_subset_that_does_not_match():
    tx, eps = random_subset(0.5), jnp.ones(2)
    with pytest.raises(ValueError, match="subset does not match params"):
        tx.update(eps, tx.init(eps), subset=jnp.ones(3, bool))


def test_a_probability_of_one_as_an_integer_keeps_everything():
    tx, eps = random_subset(beta=1), jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(tx.update(eps, tx.init(eps))[0], eps)


@pytest.mark.parametrize("key", [jax.random.split(jax.random.key(0)), 0.5, np.zeros(2, np.uint32)])
def test_what_is_no_key(key):
    with pytest.raises(TypeError, match="key must be one random key"):
        random_subset(0.5, key)
