"""The benchmark of convolutions, at its smallest size."""

import re

import jax
import pytest

from experiments.benchmarks import convolutions
from experiments.benchmarks.problems import compilers_convolutions

pytestmark = pytest.mark.usefixtures("settings_of_a_user")


@pytest.mark.slow
def test_the_times_are_printed(capsys):
    convolutions.main(["--networks", "cnn", "--batch-size", "4", "--steps", "1"])
    out = capsys.readouterr().out
    (line,) = re.findall(r"^cnn .*$", out, re.M)
    native, ours, torch, ratio, _ = map(float, line.split()[1:])
    assert native > 0 < ours
    # PyTorch has no such network.
    assert torch != torch
    assert ratio == pytest.approx(native / ours, rel=0.5)


@pytest.mark.parametrize("native", [True, False])
def test_each_program_has_its_convolutions(native, monkeypatch):
    seen = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: x)
    convolve = convolutions.models.convolve
    monkeypatch.setattr(
        convolutions.models, "convolve", lambda *x, **y: seen.append(0) or convolve(*x, **y)
    )
    convolutions.jitted_step("cnn", 2, native)
    assert bool(seen) != native
    with compilers_convolutions():
        assert convolutions.models.convolve is jax.lax.conv_general_dilated


def test_unknown_networks_are_refused(capsys):
    with pytest.raises(SystemExit):
        convolutions.main(["--networks", "resnet21"])
    assert "--networks has no 'resnet21'" in capsys.readouterr().err
