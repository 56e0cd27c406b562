"""The curvature along full-batch training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments import edge
from experiments.data import Source, load
from experiments.measures.edge import Setting, curvature_along, sams_edge
from experiments.measures.edge_report import late
from tests.experiments.rows import read_csv
from tests.experiments.script import call, refusal

SMALL = ["--train-examples", 40, "--widths", 5, 4, "--steps", 4, "--every", 2, "--seeds", 2]


def test_sams_edge():
    """At the edge, SAM's step multiplies a small error along the top eigenvector by -1.

    On a quadratic of curvature h, a step from w is w - eta h (w + rho sign(w)): it returns to -w
    if eta h (|w| + rho) = 2 |w|. There, g = h |w|.
    """
    rho, eta, w = 0.3, 0.2, np.array([0.1, 1.0, 10.0])
    h = 2 * w / (eta * (w + rho))
    np.testing.assert_allclose(sams_edge(h * w, eta, rho), h, rtol=1e-12)
    # It is the edge of stability for a small radius.
    np.testing.assert_allclose(sams_edge(h * w, eta, 1e-9), 2 / eta, rtol=1e-6)
    np.testing.assert_allclose(sams_edge(h * w, eta, 0), 2 / eta)


@pytest.mark.parametrize("loss", ["squared", pytest.param("logistic", marks=pytest.mark.slow)])
def test_the_first_curvature_is_that_of_the_dense_hessian(loss):
    setting = Setting(loss, 0.1, 0.1, steps=1, every=1, widths=(3,))
    found, examples = curvature_along(Source("digits", 40), ["gd", "sam"], 2, setting)
    assert examples == 40
    assert [(m.method, m.step, m.seed) for m in found] == [
        (method, step, seed) for method in ("gd", "sam") for step in (0, 1) for seed in (0, 1)
    ]
    split = load(Source("digits", 40)).train
    x = jnp.asarray(split.images.reshape(40, -1) / 16, jnp.float32)
    y = jax.nn.one_hot(split.labels, 10)
    keys = jax.random.split(jax.random.key(1), 2)
    params = [
        {"w": jax.random.normal(k, s) / np.sqrt(s[0]), "b": jnp.zeros(s[1])}
        for k, s in zip(keys, [(64, 3), (3, 10)], strict=True)
    ]
    flat, unravel = ravel_pytree(params)

    def value(flat):
        first, second = unravel(flat)
        outputs = jnp.tanh(x @ first["w"] + first["b"]) @ second["w"] + second["b"]
        if loss == "squared":
            return 0.5 * ((outputs - y) ** 2).sum(-1).mean()
        return -(jax.nn.log_softmax(outputs) * y).sum(-1).mean()

    (first,) = [m for m in found if (m.method, m.step, m.seed) == ("gd", 0, 1)]
    gradient = jax.grad(value)(flat)
    largest = jnp.linalg.eigvalsh(jax.hessian(value)(flat))[-1]
    assert first.loss == pytest.approx(float(value(flat)), rel=1e-5)
    assert first.gradient == pytest.approx(float(jnp.linalg.norm(gradient)), rel=1e-4)
    assert first.eigenvalue == pytest.approx(float(largest), rel=1e-3)
    # One step of each method, by hand.
    ascent = 0.1 * gradient / jnp.linalg.norm(gradient)
    for method, at in (("gd", flat), ("sam", flat + ascent)):
        (later,) = [m for m in found if (m.method, m.step, m.seed) == (method, 1, 1)]
        expected = value(flat - 0.1 * jax.grad(value)(at))
        assert later.loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    folder = tmp_path / "new"
    status, out, err = call(edge.main, capsys, *SMALL, "--output", folder)
    assert status == 0, err
    assert out.endswith(f"wrote {folder / 'report.md'} and {folder / 'report.html'}\n")
    rows = read_csv(folder / "edge.csv")
    # Methods, steps, seeds.
    assert len(rows) == 4 * 3 * 2
    losses = {row["method"]: row["loss"] for row in rows if row["step"] == "4"}
    assert len(set(losses.values())) == 4
    text = (folder / "report.md").read_text()
    assert "40 examples in every step, squared loss, step size 0.05, rho 0.1" in text
    assert "| bisam-tanh | 2 |" in text


def test_late_values_are_medians_over_the_second_half():
    setting = Setting("squared", 0.1, 0.1, steps=4, every=1, widths=(2,))
    found, _ = curvature_along(Source("digits", 40), ["gd"], 1, setting)
    numbered = [m._replace(loss=float(number)) for number, m in enumerate(found)]
    assert late(numbered, "gd", lambda m: m.loss).mean == 3.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rho", "0"], "--rho must be finite, greater than 0, got 0"),
        (["--learning-rate", "inf"], "--learning-rate must be finite"),
        (["--every", "3"], "--every must divide --steps, got 3 and 4000"),
        (["--methods", "bisam-lgo"], "Did you mean bisam-log?"),
        (["--widths", "0"], "--widths must be numbers at least 1, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(args, message, capsys):
    assert message in refusal(edge.main, capsys, *args)
