"""What a step asks of many devices, counted for a small network."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import optax
import pytest

from bisam_jax import perturbation_loss
from experiments.benchmarks import scaling
from experiments.benchmarks.scaling import Problem

SIZES, EXAMPLES = (16, 256, 16), 256


def small_problem():
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in itertools.pairwise(SIZES)]
    batch = {
        "x": jax.ShapeDtypeStruct((EXAMPLES, SIZES[0]), jnp.float32),
        "y": jax.ShapeDtypeStruct((EXAMPLES,), jnp.int32),
    }

    def mean_of(per_example):
        def fn(params, batch):
            x = batch["x"]
            for w in params[:-1]:
                x = jnp.tanh(x @ w)
            return per_example(x @ params[-1], batch["y"]).mean()

        return fn

    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return Problem(params, batch, mean_of(cross_entropy), mean_of(perturbation_loss))


GRADIENT = 4 * sum(math.prod(pair) for pair in itertools.pairwise(SIZES))
BATCH = 4 * EXAMPLES * (SIZES[0] + 1)


@pytest.fixture(scope="module")
def counted():
    """The row of a method and a number of devices."""

    @functools.cache
    def row(method, devices):
        (only,) = scaling.count(small_problem(), 0.05, [devices], [method])
        assert (only.pop("method"), only.pop("devices")) == (method, devices)
        return only

    return row


# The larger number has all that could be wrong with the smaller.
many = pytest.mark.parametrize("devices", [8, pytest.param(2, marks=pytest.mark.slow)])


@pytest.mark.parametrize(
    ("method", "gradients"),
    [
        ("SGD", 1),
        ("SAM", 2),
        ("BiSAM", 2),
        ("BiSAM, groups", 1),
        ("BiSAM, groups, shard_map", 1),
        ("SAMPa", 2),
    ],
)
@many
def test_gradients_that_are_sent(counted, method, gradients, devices):
    expected = gradients * 2 * (devices - 1) / devices * GRADIENT
    assert counted(method, devices)["sent_bytes"] == pytest.approx(expected, abs=16)
    assert counted(method, devices)["collectives"] >= 1


def test_one_device_sends_nothing(counted):
    assert counted("SGD", 1)["collectives"] == counted("SGD", 1)["sent_bytes"] == 0


def test_halves_send_their_gradients_to_each_other(counted):
    assert counted("SAMPa, two halves", 2)["sent_bytes"] == pytest.approx(GRADIENT, rel=0.02)
    assert counted("SAMPa, two halves", 8)["sent_bytes"] < counted("SAMPa", 8)["sent_bytes"]


@pytest.mark.parametrize(
    ("method", "gradients"),
    [
        ("SGD", 1),
        ("BiSAM", 2),
        ("BiSAM, groups", 2),
        ("BiSAM, groups, shard_map", 2),
        ("SAMPa", 2),
        ("SAMPa, two halves", 2),
        ("SGD, sharded parameters", 1),
        ("BiSAM, sharded parameters, batch", 2),
    ],
)
@many
def test_flops_of_a_device_do_not_grow(counted, method, gradients, devices):
    ratio = counted(method, devices)["flops"] / counted("SGD", 1)["flops"]
    assert ratio == pytest.approx(gradients, rel=0.06)


@pytest.mark.parametrize("method", ["SGD", "BiSAM"])
@pytest.mark.parametrize(
    ("layout", "batch"), [("", BATCH), (", sharded parameters", 8 * BATCH)], ids=["one", "all"]
)
def test_arguments(counted, method, layout, batch):
    """Parameters and momentum, and the examples: one device's, or all."""
    parts = 8 if layout else 1
    got = counted(method + layout, 8)["argument_bytes"]
    assert got == pytest.approx(2 * GRADIENT / parts + batch, rel=0.01)


def test_sharded_parameters_and_batch(counted):
    for method in ("SGD", "BiSAM"):
        got = counted(f"{method}, sharded parameters, batch", 8)["argument_bytes"]
        assert got == pytest.approx((2 * GRADIENT + 8 * BATCH) / 8, rel=0.01)


def test_rows_are_methods_on_devices(monkeypatch):
    """Two halves need an even number of devices."""
    monkeypatch.setattr(scaling, "_measure", lambda case, problem, devices: {"case": case})
    names = ["SGD", "SAMPa, two halves"]
    rows = scaling.count(small_problem(), 0.05, [1, 2, 4], names)
    assert [(row["method"], row["devices"]) for row in rows] == [
        ("SGD", 1),
        ("SGD", 2),
        ("SGD", 4),
        ("SAMPa, two halves", 2),
        ("SAMPa, two halves", 4),
    ]
    every = scaling.count(small_problem(), 0.05, [2])
    assert [row["method"] for row in every] == list(scaling.cases(small_problem(), 0.05))
    assert len(every) == 11


def test_the_problem_of_a_network(monkeypatch):
    monkeypatch.setitem(scaling.NETWORKS, "mlp", ("small", {"width": 8}))
    (row,) = scaling.count(scaling.problem_of("mlp", 4), 0.05, [2], ["BiSAM"])
    # Two layers of eight with batch normalization; parameters, momentum, images and labels.
    weights = 784 * 8 + 8 * 8 + 8 * 10
    assert row["argument_bytes"] == pytest.approx(4 * (2 * weights + 4 * 785), rel=0.02)
    assert row["sent_bytes"] > 2 * 4 * weights


def test_command(capsys, monkeypatch):
    asked = []

    def count(problem, rho, devices):
        asked.append((problem, rho, devices))
        names = [(method, n) for method in ("SGD", "BiSAM") for n in (1, 16)]
        return [
            {"method": method, "devices": n, "flops": 100.0 + 50 * i, "collectives": i}
            | {"sent_bytes": 1e6 * i, "argument_bytes": 2e6 * i, "temporary_bytes": 3e6 * i}
            for i, (method, n) in enumerate(names)
        ]

    monkeypatch.setattr(scaling, "count", count)
    monkeypatch.setattr(scaling, "problem_of", lambda *network: network)
    monkeypatch.setattr(jax.config, "update", lambda *option: None)
    scaling.main(["--network", "mlp", "--batch-size", "4", "--rho", "0.1"])
    assert asked == [(("mlp", 4), 0.1, scaling.DEVICES)]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1:] for line in lines if line[:1] == ["BiSAM"]] == [
        ["2.00", "2.50"],
        ["2.00", "3.00"],
        ["2", "3"],
        ["4.00", "6.00"],
        ["6.00", "9.00"],
    ]
