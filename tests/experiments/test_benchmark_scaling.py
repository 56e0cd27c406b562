import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest

from bisam_jax import perturbation_loss
from experiments import benchmark, benchmark_scaling
from experiments.benchmark_scaling import Collective, Problem, collectives

HLO = """
HloModule jit_step, is_scheduled=true, num_partitions=8

ENTRY %main.1 (param: f32[4,8], param.1: pred[3]) -> (f32[4,8], f32[]) {
  %param = f32[4,8]{1,0} parameter(0)
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%param), channel_id=1, replica_groups={{0,1},{2,3}}
  %all-reduce.2 = (f32[10]{0}, bf16[3,2]{1,0:T(8,128)(2,1)}, /*index=2*/f32[]) all-reduce(%a, %b,\
 /*index=2*/%c), replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="jit(step)/all-reduce"}
  %all-gather.1 = f32[64]{0} all-gather(%d), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %reduce-scatter.1 = s32[5]{0} reduce-scatter(%e), replica_groups={}, dimensions={0}
  %all-to-all.1 = (pred[2,3]{1,0}, pred[2,3]{1,0}) all-to-all(%f, %g), replica_groups={{0,1},{2,3}}
  %collective-permute.1 = f64[2]{0} collective-permute(%h), source_target_pairs={{0,1},{1,0}}
  %all-reduce-start.1 = (f32[6]{0}, f32[]) all-reduce-start(%i, %j), replica_groups={{0,1,2,3}}
  %all-reduce-done.1 = (f32[6]{0}, f32[]) all-reduce-done(%all-reduce-start.1)
  %all-gather-start.1 = (f32[2]{0}, f32[16]{0}) all-gather-start(%k), replica_groups=[1,8]<=[8]
  %all-gather-start.2 = ((f32[2]{0}, u8[1]{0}), (f32[8]{0}, u8[4]{0})) all-gather-start(%k, %l),\
 replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %reduce-scatter-start = ((f32[8]{0}), f32[2]{0}, u32[]) reduce-scatter-start(%m),\
 replica_groups=mesh['x'=2,'y'=8] {'x','y':(2)4}
  %collective-permute-start = (f16[9]{0}, f16[9]{0}, u32[], u32[]) collective-permute-start(%n)
  %all-reduce.3 = f32[7]{0} all-reduce(%o), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
  ROOT %fusion = (f32[4,8]{1,0}, f32[]) fusion(%all-reduce.1, %all-reduce.2), kind=kLoop
}
"""

FOUND = [
    Collective("all-reduce", 128, 2),
    Collective("all-reduce", 56, 4),
    Collective("all-gather", 256, 2),
    Collective("reduce-scatter", 20, 8),
    Collective("all-to-all", 12, 2),
    Collective("collective-permute", 16, 8),
    Collective("all-reduce", 28, 4),
    Collective("all-gather", 64, 8),
    Collective("all-gather", 36, 4),
    Collective("reduce-scatter", 8, 8),
    Collective("collective-permute", 18, 8),
]


def test_collectives():
    assert collectives(HLO, devices=8) == FOUND


def test_sent():
    sent = [collective.sent for collective in FOUND]
    assert sent == [128, 84, 128, 140, 6, 16, 42, 56, 27, 56, 18]


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
def measured():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rows = benchmark_scaling.measure(small_problem(), 0.05, (1, 2, 8))
    return lambda method, devices: next(
        row for row in rows if (row["method"], row["devices"]) == (method, devices)
    )


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
def test_gradients_that_are_sent(measured, method, gradients):
    for devices in (1, 2, 8):
        expected = gradients * 2 * (devices - 1) / devices * GRADIENT
        assert measured(method, devices)["sent_bytes"] == pytest.approx(expected, abs=16)


def test_halves_send_their_gradients_to_each_other(measured):
    assert measured("SAMPa, two halves", 2)["sent_bytes"] == pytest.approx(GRADIENT, rel=0.02)
    assert measured("SAMPa, two halves", 8)["sent_bytes"] < measured("SAMPa", 8)["sent_bytes"]


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
def test_flops_of_a_device_do_not_grow(measured, method, gradients):
    for devices in (2, 8):
        ratio = measured(method, devices)["flops"] / measured("SGD", 1)["flops"]
        assert ratio == pytest.approx(gradients, rel=0.06)


@pytest.mark.parametrize("method", ["SGD", "BiSAM"])
@pytest.mark.parametrize(
    ("layout", "batch"), [("", BATCH), (", sharded parameters", 8 * BATCH)], ids=["one", "all"]
)
def test_arguments(measured, method, layout, batch):
    """Parameters and momentum, and the examples: one device's, or all."""
    parts = 8 if layout else 1
    got = measured(method + layout, 8)["argument_bytes"]
    assert got == pytest.approx(2 * GRADIENT / parts + batch, rel=0.01)


def test_sharded_parameters_and_batch(measured):
    for method in ("SGD", "BiSAM"):
        got = measured(f"{method}, sharded parameters, batch", 8)["argument_bytes"]
        assert got == pytest.approx((2 * GRADIENT + 8 * BATCH) / 8, rel=0.01)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(benchmark.NETWORKS, "mlp", ("small", {"width": 8}))
    few = functools.partial(benchmark_scaling.run, devices=[1, 16], names=["SGD", "BiSAM"])
    monkeypatch.setattr(benchmark_scaling, "run", few)
    output = tmp_path / "scaling.json"
    args = ["--scaling", "--network", "mlp", "--batch-size", "4", "--output", str(output)]
    benchmark.main(args)
    printed = capsys.readouterr().out
    rows = json.loads(output.read_text())["results"]["mlp"]
    assert [(row["method"], row["devices"]) for row in rows] == [
        ("SGD", 1),
        ("SGD", 16),
        ("BiSAM", 1),
        ("BiSAM", 16),
    ]
    lines = [line.split() for line in printed.splitlines() if line.startswith("BiSAM ")]
    flops, sent, *_ = lines
    assert flops == ["BiSAM", *(f"{row['flops'] / rows[0]['flops']:.2f}" for row in rows[2:])]
    assert sent == ["BiSAM", *(f"{row['sent_bytes'] / 1e6:.2f}" for row in rows[2:])]


def test_one_thing_at_a_time():
    with pytest.raises(ValueError, match="--loop and --scaling exclude each other"):
        benchmark.Config(loop=True, scaling=True)
