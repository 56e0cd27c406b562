import re

import jax
import pytest

from experiments import benchmark_replicas

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("model", ["mlp", "resnet8"])
def test_every_way_is_timed(model, capsys):
    benchmark_replicas.main(["--model", model, "--batch-size", "8", "--at-once", "1", "2"])
    out = capsys.readouterr().out
    found = re.findall(r"^(.+?) +(\d+\.\d+) +(\d+\.\d+)x$", out, re.M)
    assert [name for name, *_ in found] == [
        "alone",
        f"one on each of {jax.local_device_count()} devices",
        *(f"{count} at once on each of {jax.local_device_count()}" for count in (1, 2)),
    ]
    for _, time, ratio in found:
        assert float(ratio) == pytest.approx(float(found[0][1]) / float(time), abs=0.01, rel=0.01)


def test_a_model_that_is_none(capsys):
    with pytest.raises(SystemExit):
        benchmark_replicas.main(["--model", "none"])
    assert "none" in capsys.readouterr().err
