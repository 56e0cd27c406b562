import re

import jax
import pytest

from experiments import benchmark_replicas

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_every_way_is_timed(capsys):
    benchmark_replicas.main(["--model", "cnn", "--batch-size", "4", "--at-once", "1"])
    out = capsys.readouterr().out
    found = re.findall(r"^(.+?) +(\d+\.\d+) +(\d+\.\d+)x$", out, re.M)
    assert [name for name, *_ in found] == [
        "alone",
        f"one on each of {jax.local_device_count()} devices",
        f"1 at once on each of {jax.local_device_count()}",
    ]
    for _, time, ratio in found:
        assert float(ratio) == pytest.approx(float(found[0][1]) / float(time), abs=0.01, rel=0.01)


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--model", "none"], "none"), (["--at-once", "0"], "--at-once must be at least 1, got (0,)")],
)
def test_bad_input_is_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark_replicas.main(args)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
