import json

import pytest

from experiments import benchmark, methods

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_benchmark(tmp_path, capsys, monkeypatch):
    few = ("sgd", "sam", "gsam", "bilateral", "friendly")
    monkeypatch.setattr(methods, "METHODS", {name: methods.METHODS[name] for name in few})
    output = tmp_path / "benchmark.json"
    benchmark.main(
        ["--steps", "4", "--batch-size", "64", "--network", "mlp", "--output", str(output)]
    )
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["versions"]["jax"]
    assert list(report["results"]) == ["mlp"]
    for network, tables in report["results"].items():
        assert network in printed
        rows = tables["beside optax"]
        by_name = {row["method"]: row for row in rows}
        assert list(by_name) == [
            "sgd",
            "sam",
            "bisam-log",
            "optax.contrib.sam, opaque",
            "optax.contrib.sam, transparent",
        ]
        for name, row in by_name.items():
            assert name in printed
            low, high = row["quartiles"]
            assert 0 < low <= row["milliseconds"] <= high
        ours, opaque, transparent = (by_name[name]["state_bytes"] for name in list(by_name)[2:])
        assert ours < opaque < transparent
        ratio = by_name["bisam-log"]["flops"] / by_name["sgd"]["flops"]
        assert ratio == pytest.approx(2, rel=0.1)
        family = {
            row["method"]: row["flops"] / tables["family"][0]["flops"] for row in tables["family"]
        }
        expected = {
            "sam, ce": 2,
            "sam, log": 2,
            "gsam, ce": 2,
            "gsam, log": 2.67,  # XLA shares a forward pass
            "bilateral, ce": 3,
            "bilateral, log": 3.67,
            "friendly, log": 2,
        }
        for name, gradients in expected.items():
            assert family[name] == pytest.approx(gradients, rel=0.1), name


def test_loop(tmp_path, capsys):
    output = tmp_path / "loop.json"
    args = ["--loop", "--network", "mlp", "--steps", "2", "--batch-size", "16"]
    benchmark.main([*args, "--output", str(output)])
    printed = capsys.readouterr().out
    rows = json.loads(output.read_text())["results"]["mlp"]
    assert [row["augmentation"] for row in rows] == ["none", "crop, flip, Cutout"]
    for row in rows:
        ratio = row["bare_milliseconds"] / row["loop_milliseconds"]
        assert row["speed_of_the_loop"] == pytest.approx(ratio)
        assert f"{100 * ratio:.1f} %" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "1"], "--steps must be at least 2"),
        (["--rho", "nan"], "--rho must be finite"),
        (["--output", "missing/file.json"], "--output must be a file in an existing folder"),
    ],
)
def test_bad_input_is_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(args)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
