"""Layouts: where arrays lie, and what devices cannot share."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config.config import Config
from experiments.config.recipe import resolve
from experiments.step.layout import layout_of, sharding_of
from experiments.system.command_line import ArgumentError

pytestmark = pytest.mark.devices


def layout(**options):
    config = Config(**{"devices": 8} | options)
    return layout_of(resolve(config), config)


@pytest.mark.parametrize(
    ("options", "shape", "batch_axes", "parallelism"),
    [
        ({}, (1, 8, 1), ("data",), "jit"),
        ({"devices": 2, "parallelism": "pmap"}, (1, 2, 1), ("data",), "pmap"),
        ({"fsdp": 4}, (1, 2, 4), ("data",), "jit"),
        ({"fsdp": 4, "model": "cnn"}, (1, 2, 4), ("data", "fsdp"), "jit"),
        ({"method": "sampa"}, (2, 4, 1), ("data",), "jit"),
        ({"method": "sampa", "parallelism": "shard_map"}, (1, 8, 1), ("data",), "shard_map"),
        ({"method": "sampa", "devices": 1}, (1, 1, 1), ("data",), "jit"),
        # Every device has whole groups, so each computes its own.
        ({"group_size": 4}, (1, 8, 1), ("data",), "shard_map"),
        ({"group_size": 4, "devices": 1}, (1, 1, 1), ("data",), "jit"),
        ({"group_size": 4, "microbatch_size": 16}, (1, 8, 1), ("data",), "jit"),
        ({"group_size": 8}, (1, 8, 1), ("data",), "jit"),
        ({"group_size": 4, "fsdp": 2}, (1, 4, 2), ("data",), "jit"),
    ],
    ids=str,
)
def test_meshes(options, shape, batch_axes, parallelism):
    made = layout(**options)
    assert made.mesh.devices.shape == shape
    assert (made.batch_axes, made.parallelism) == (batch_axes, parallelism)
    assert made.axis_name == (None if parallelism == "jit" else "data")
    assert made.gradient_axis == ("gradients" if shape[0] == 2 else None)


def test_matrices_lie_over_fsdp_along_their_longest_axis():
    mesh = layout(fsdp=4).mesh
    for shape, spec in {
        (8, 12): jax.P(None, "fsdp"),
        (12, 8): jax.P("fsdp"),
        (3, 8, 5): jax.P(None, "fsdp"),
        (3, 5): jax.P(),
        (8,): jax.P(),
    }.items():
        assert sharding_of(jnp.zeros(shape), mesh).spec == spec
    assert sharding_of(jnp.zeros((8, 12)), layout().mesh).spec == jax.P()


def test_a_batch_is_laid_over_the_devices_in_order():
    made = layout(model="cnn", fsdp=4)
    batch = made.batch(np.arange(16), 16)
    np.testing.assert_array_equal(made.rows_here(16), np.arange(16))
    np.testing.assert_array_equal(batch, np.arange(16))
    for number, part in enumerate(batch.addressable_shards):
        np.testing.assert_array_equal(part.data, [2 * number, 2 * number + 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 9}, "--devices must be at most the 8 there are, got 9"),
        ({"batch_size": 20}, "--batch-size must be a multiple of 8, the number of devices"),
        ({"batch_size": 20}, "that share it, got 20: use 16, or fewer --devices"),
        ({"fsdp": 3}, "--fsdp must divide the number of devices, got 3 and 8"),
        ({"fsdp": 2, "parallelism": "pmap"}, "--fsdp needs --parallelism jit, got pmap"),
        (
            {"group_size": 8, "parallelism": "shard_map"},
            "--group-size must divide the 4 examples of each of 8 devices with --parallelism "
            "shard_map, got 8: use --parallelism jit",
        ),
        (
            {"microbatch_size": 4, "parallelism": "pmap"},
            "--microbatch-size must be a multiple of 8, for 8 devices with --parallelism pmap, "
            "got 4",
        ),
        ({"batch_statistics": "per-device"}, "--batch-statistics per-device needs --parallelism"),
        (
            {"batch_statistics": "per-device", "parallelism": "pmap", "batch_size": 8},
            "--batch-statistics per-device needs 2 examples on each of 8 devices at a time",
        ),
        (
            {"method": "efficient", "gamma": 0.25, "parallelism": "shard_map"},
            "--method efficient needs 2 examples on each of 8 devices at a time",
        ),
        (
            {"method": "sparse-fisher", "batch_size": 8, "parallelism": "pmap"},
            "--method sparse-fisher needs 2 examples on each of 8 devices at a time",
        ),
        (
            {"batch_statistics": "per-device", "parallelism": "pmap", "group_size": 4},
            "--batch-statistics per-device has no meaning with --group-size",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batches_that_devices_cannot_share(options, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        layout(**options)
