"""Means over a split of any length."""

import numpy as np
import pytest

from experiments import data
from experiments.config.config import Config, Place
from experiments.config.recipe import resolve
from experiments.step import evaluation
from experiments.step.feeds import InMemory
from experiments.step.layout import layout_of

LAYOUTS = [layout_of(resolve(Config(batch_size=8)), Place(devices=n)) for n in (1, 8)]


def apply(params, stats, images, *, train):
    """Images are the logits."""
    assert not train
    return images[:, 0, 0, :], stats


def evaluated(logits, labels, layout, batch_size=5, normalise=lambda images: images):
    images = np.asarray(logits, np.float32)[:, None, None, :]
    feed = InMemory(data.Split(images, np.asarray(labels, np.int32)), layout, 1)
    sums = evaluation.make_sums(evaluation.make_predict(apply, normalise))
    return evaluation.make_evaluate(sums, batch_size, layout)({}, {}, feed)


def test_accuracy_and_loss():
    result = evaluated(np.eye(4), [0, 1, 0, 0], LAYOUTS[0], 10, lambda images: 2 * images)
    assert result.accuracy == 0.5
    right, wrong = np.log(3 + np.exp(2.0)) - 2, np.log(3 + np.exp(2.0))
    np.testing.assert_allclose(result.loss, (right + wrong) / 2, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["1", "8"])
@pytest.mark.parametrize("examples", [1, 4, 5, 7, 10])
def test_each_example_counts_once(examples, layout):
    rng = np.random.default_rng(examples)
    logits, labels = rng.normal(size=(examples, 3)).astype(np.float32), np.arange(examples) % 3
    result = evaluated(logits, labels, layout)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(result.accuracy, (logits.argmax(-1) == labels).mean(), rtol=1e-6)
    np.testing.assert_allclose(result.loss, -log_p[np.arange(examples), labels].mean(), rtol=1e-5)


def test_logits_that_are_not_finite_have_no_accuracy():
    logits = np.eye(3)
    logits[1, 1] = np.nan
    assert np.isnan(evaluated(logits, range(3), LAYOUTS[0]).accuracy)
