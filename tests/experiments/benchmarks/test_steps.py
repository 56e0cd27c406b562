"""What the benchmark of steps measures and prints."""

import pytest

from experiments.benchmarks import steps
from experiments.config import methods
from tests.experiments.script import refusal

# Batch gradients of a step, by FLOPs. XLA shares a forward pass of some.
GRADIENTS = {"gsam": (2, 2.67)}


@pytest.mark.slow
def test_every_step_is_timed_and_counted(capsys, monkeypatch):
    few = {name: methods.METHODS[name] for name in ("sgd", *GRADIENTS)}
    monkeypatch.setattr(methods, "METHODS", few)
    monkeypatch.setitem(steps.NETWORKS, "mlp", ("784-256-256-10", {"width": 256}))
    tables = {}
    time_steps = steps.time_steps
    monkeypatch.setattr(
        steps, "time_steps", lambda *args: tables.setdefault("mlp", time_steps(*args))
    )
    steps.main(["--steps", "2", "--batch-size", "64", "--network", "mlp"])
    printed = capsys.readouterr().out
    assert "mlp 784-256-256-10, batch 64, beside optax" in printed
    by_name = {row["method"]: row for row in tables["mlp"]["beside optax"]}
    assert list(by_name) == [
        "sgd",
        "sam",
        "bisam-log",
        "optax.contrib.sam, opaque",
        "optax.contrib.sam, transparent",
    ]
    assert steps.steps_as_text(list(by_name.values())) in printed
    for row in by_name.values():
        low, high = row["quartiles"]
        assert 0 < low <= row["milliseconds"] <= high
    ours, opaque, transparent = (by_name[name]["state_bytes"] for name in list(by_name)[2:])
    assert ours < opaque < transparent
    for name in list(by_name)[1:]:
        ratio = by_name[name]["flops"] / by_name["sgd"]["flops"]
        assert ratio == pytest.approx(2, rel=0.1), name
    plain, *family = tables["mlp"]["family"]
    assert plain["method"] == "sgd, ce"
    assert {row["method"]: row["flops"] / plain["flops"] for row in family} == {
        f"{name}, {perturbation}": pytest.approx(gradients, rel=0.1)
        for name, both in GRADIENTS.items()
        for perturbation, gradients in zip(("ce", "log"), both, strict=True)
    }


def test_times_and_flops_are_relative_to_the_first():
    rows = [
        {"method": name, "milliseconds": time, "quartiles": [time, time], "flops": flops}
        | {"temporary_bytes": 2e6, "state_bytes": 1234}
        for name, time, flops in (("sgd", 0.5, 100), ("sam", 1.25, 200))
    ]
    _, *lines = steps.steps_as_text(rows).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "sgd 0.50 0.50-0.50 1.00x 1.00x 2.00 MB 1,234 bytes",
        "sam 1.25 1.25-1.25 2.50x 2.00x 2.00 MB 1,234 bytes",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "1"], "--steps must be finite, at least 2"),
        (["--rho", "nan"], "--rho must be finite"),
    ],
    ids=["one step", "no radius"],
)
def test_bad_input_is_one_line(args, message, capsys):
    assert message in refusal(steps.main, capsys, *args)
