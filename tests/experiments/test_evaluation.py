"""Means over a split, whatever its length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data, evaluation, layout
from experiments.config import Config

LAYOUTS = [layout.layout_of(Config(devices=n, batch_size=8).resolved()) for n in (1, 8)]


def apply(params, stats, images, *, train):
    """Images are the logits."""
    assert not train
    return images[:, 0, 0, :], stats


def split(logits, labels):
    return data.Split(jnp.asarray(logits)[:, None, None, :], jnp.asarray(labels))


def test_accuracy_and_loss():
    evaluate = evaluation.make_evaluate(
        evaluation.make_sums(apply, lambda images: 2 * images), 10, LAYOUTS[0]
    )
    result = evaluate({}, {}, split(jnp.eye(4), jnp.array([0, 1, 0, 0])))
    assert result.accuracy == 0.5
    right, wrong = np.log(3 + np.exp(2.0)) - 2, np.log(3 + np.exp(2.0))
    np.testing.assert_allclose(result.loss, (right + wrong) / 2, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["1", "8"])
@pytest.mark.parametrize("examples", [1, 4, 5, 7, 10])
def test_each_example_counts_once(examples, layout):
    rng = np.random.default_rng(examples)
    logits, labels = rng.normal(size=(examples, 3)).astype(np.float32), np.arange(examples) % 3
    held = layout.put(jax.device_get(split(logits, labels)))
    result = evaluation.make_evaluate(evaluation.make_sums(apply, lambda x: x), 5, layout)(
        {}, {}, held
    )
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(result.accuracy, (logits.argmax(-1) == labels).mean(), rtol=1e-6)
    np.testing.assert_allclose(result.loss, -log_p[np.arange(examples), labels].mean(), rtol=1e-5)


def test_logits_that_are_not_finite_have_no_accuracy():
    logits = jnp.eye(3).at[1, 1].set(jnp.nan)
    evaluate = evaluation.make_evaluate(evaluation.make_sums(apply, lambda x: x), 5, LAYOUTS[0])
    assert np.isnan(evaluate({}, {}, split(logits, jnp.arange(3))).accuracy)
