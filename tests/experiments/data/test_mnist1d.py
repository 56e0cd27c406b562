"""MNIST-1D from its authors' generator."""

import random
import sys

import numpy as np
import pytest
from mnist1d.data import get_dataset_args, make_dataset

from experiments import data
from experiments.config.config import Config
from experiments.config.recipe import resolve
from experiments.data import white_of
from experiments.data.mnist1d import _made, mnist1d
from experiments.system.command_line import ArgumentError


@pytest.fixture(scope="module")
def dataset():
    return data.load(data.Source("mnist1d"))


def test_the_published_test_part(dataset):
    made = make_dataset(get_dataset_args())
    np.testing.assert_array_equal(dataset.test.images[:, 0, :, 0], np.float32(made["x_test"]))
    np.testing.assert_array_equal(dataset.test.labels, made["y_test"])
    rest = np.concatenate([dataset.train.images, dataset.validation.images])[:, 0, :, 0]
    order, expected = np.lexsort(rest.T), np.float32(made["x"])
    np.testing.assert_array_equal(rest[order], expected[np.lexsort(expected.T)])
    labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
    np.testing.assert_array_equal(labels[order], made["y"][np.lexsort(expected.T)])


def test_sizes(dataset):
    assert [part.examples for part in dataset[:3]] == [3600, 400, 1000]
    assert (dataset.image_shape, dataset.classes) == ((1, 40, 1), 10)
    assert dataset.train.images.dtype == np.float32
    assert np.bincount(dataset.validation.labels).tolist() == pytest.approx([40] * 10, abs=2)


@pytest.mark.slow
def test_the_global_generators_are_left_alone():
    _made.cache_clear()
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    _made()
    assert (random.random(), np.random.rand()) == expected


def test_clear_errors(monkeypatch):
    with pytest.raises(data.DatasetError, match=r"use 'mnist1d', got 'mnist1d/small'"):
        mnist1d(data.Source("mnist1d/small"))
    with pytest.raises(data.DatasetError, match=r"mnist1d has signals, not images"):
        white_of("mnist1d")
    for options in ({"method": "adversarial-linf"}, {"crop_padding": 2}, {"flip": True}):
        with pytest.raises(ArgumentError, match=r"mnist1d(, which)? has signals, not images"):
            resolve(Config(dataset="mnist1d", **options))
    with pytest.raises(data.DatasetError, match=r"1x40 pixels: image_size must be left out, got 1"):
        data.load(data.Source("mnist1d", image_size=1))
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    _made.cache_clear()
    with pytest.raises(data.DatasetError, match=r"pip install 'bisam_jax\[mnist1d\]'"):
        data.load(data.Source("mnist1d"))
