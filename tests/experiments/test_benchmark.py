import json

import pytest

from experiments import benchmark


def test_benchmark(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(benchmark.NETWORKS, "cnn 32-64-128", ("cnn", {"width": 4}))
    output = tmp_path / "benchmark.json"
    benchmark.main(["--steps", "4", "--batch-size", "8", "--output", str(output)])
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["versions"]["jax"]
    for network, rows in report["results"].items():
        assert network in printed
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
