"""Sharpness, curvature and slices of trained networks, and their report."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bisam_jax
from experiments import sharpness
from experiments.measures.sharpness import loss_of, normalised
from experiments.measures.slices import filter_normalised, measured_slices
from experiments.measures.trained import trained_in
from tests.experiments.rows import read_csv
from tests.experiments.script import call, refusal

pytestmark = pytest.mark.usefixtures("small_mlp")
SMALL = ["--examples", 64, "--radii", 0.1, 0.5, "--adaptive-radii", 1, "--steps", 5]
SMALL += ["--directions", 4, "--eigenvalues", 2, "--num-matvecs", 8, "--points", 3]


@pytest.fixture
def networks(finished):
    (found,), _ = trained_in([finished / "run0", finished / "run1"], 64, every_candidate=True)
    return found


def of_seed(networks, seed):
    params, stats = jax.tree.map(lambda x: x[seed], (networks.params, networks.stats))
    return params, stats, (networks.train.images, networks.train.labels[seed])


@pytest.mark.slow
def test_the_command(finished, networks, tmp_path, capsys):
    folder = tmp_path / "new"
    names = (finished / "run0", finished / "run1")
    status, out, err = call(sharpness.main, capsys, *names, *SMALL, "--output", folder)
    assert status == 0, err
    assert out.endswith(f"wrote {folder / 'report.md'} and {folder / 'report.html'}\n")
    rows = read_csv(folder / "sharpness.csv")

    def numbers(quantity, ball="", at=None, column="value"):
        asked = ("bisam-log, rho 0.1", quantity, ball)
        return [
            float(row[column])
            for row in rows
            if (row["network"], row["quantity"], row["ball"]) == asked
            and (at is None or float(row["at"]) == at)
        ]

    for seed in (0, 1):
        params, stats, batch = of_seed(networks, seed)
        loss = loss_of(networks.predict, stats, False)
        balls = {("l2", 0.5): bisam_jax.l2_ball(0.5)}
        balls["adaptive l2", 1.0] = bisam_jax.adaptive_l2_ball(1.0, eta=0)
        assert numbers("loss")[seed] == pytest.approx(float(loss(params, batch).mean()), rel=1e-5)
        for (name, rho), ball in balls.items():
            measure = jax.jit(lambda p, b, ball=ball: bisam_jax.sharpness(loss, p, b, ball))  # noqa: B023
            rise, point = measure(params, batch)
            found = numbers("rise of the loss, one step", name, rho)[seed]
            assert found == pytest.approx(float(rise), rel=1e-4)
            worst = numbers("rise of the loss, worst case", name, rho)[seed]
            assert worst > found - 1e-6
            predict = networks.predict
            errors = [
                (predict(at, stats, batch[0]).argmax(-1) != batch[1]).mean()
                for at in (point, params)
            ]
            expected = float(errors[0] - errors[1])
            assert numbers("rise of the error, one step", name, rho)[seed] == pytest.approx(
                expected, abs=1e-6
            )
    measure = functools.partial(bisam_jax.hessian_eigenvalues, loss, k=2, key=0, num_matvecs=8)
    expected = jax.jit(lambda p, b: measure(p, b).values)(params, batch)
    assert [numbers("eigenvalue", at=n)[1] for n in (1, 2)] == pytest.approx(
        expected.tolist(), rel=1e-3
    )
    assert all(error > 0 for error in numbers("trace", column="uncertainty"))
    assert all(error > 0 for error in numbers("rise of the loss, random", "l2", 0.5, "uncertainty"))
    density = np.array(numbers("density")).reshape(-1, 2)
    places = np.array(numbers("density", column="at")).reshape(-1, 2)[:, 0]
    np.testing.assert_allclose(density.sum(0) * (places[1] - places[0]), 1, atol=0.2)
    text = (folder / "report.md").read_text()
    assert "| bisam-log, rho 0.1 | 2 |" in text
    assert "first 64 training examples" in text
    assert (folder / "report.html").read_text().count("data:image/svg+xml") == 6
    slices = read_csv(folder / "slices.csv")
    assert len(slices) == 2 * 2 * 3 + 9


def test_normalised_logits_have_no_scale():
    logits = jax.random.normal(jax.random.key(0), (5, 4))
    found = normalised(logits)
    np.testing.assert_allclose(found.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(found.std(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(normalised(100 * logits - 3), found, rtol=1e-3, atol=1e-4)
    assert (normalised(jnp.ones((1, 4))) == 0).all()


def test_normalised_logits_hide_the_scale_of_the_last_layer(networks):
    params, stats, batch = of_seed(networks, 0)
    larger = jax.tree.map(lambda x: x, params)
    larger["head"] = jax.tree.map(lambda x: 3 * x, params["head"])
    for hide, same in ((True, True), (False, False)):
        loss = loss_of(networks.predict, stats, hide)
        values = [float(loss(at, batch).mean()) for at in (params, larger)]
        assert (abs(values[0] - values[1]) < 1e-4) == same


def test_filters_of_directions_have_the_norms_of_the_weights():
    key = jax.random.key(0)
    params = {"w": 5 + jax.random.normal(key, (3, 3, 2, 4)), "b": jnp.ones(4)}
    direction = {"w": jax.random.normal(key, (3, 3, 2, 4)).at[..., 3].set(0), "b": jnp.ones(4)}
    found = filter_normalised(direction, params)
    norms, expected = (jnp.linalg.norm(x["w"].reshape(-1, 4), axis=0) for x in (found, params))
    np.testing.assert_allclose(norms[:3], expected[:3], rtol=1e-5)
    assert norms[3] == 0
    assert (found["b"] == 0).all()


def test_slices_meet_at_the_network_and_rise_along_the_ascent(networks):
    found = measured_slices(networks, 5, False)
    for seed in (0, 1):
        params, stats, batch = of_seed(networks, seed)
        loss = float(loss_of(networks.predict, stats, False)(params, batch).mean())
        assert found.ascent[seed, 2] == pytest.approx(loss, rel=1e-5)
        assert found.random[seed, 2] == pytest.approx(loss, rel=1e-5)
        assert found.ascent[seed, 3] > loss
    np.testing.assert_allclose(found.plane[:, 2], found.ascent[0], rtol=1e-5)
    np.testing.assert_allclose(found.plane[2], found.random[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--radii", "0"], "--radii must be numbers greater than 0, got 0"),
        (["--adaptive-radii", "nan"], "--adaptive-radii must be numbers greater than 0"),
        (["--points", "4"], "--points must be odd, at least 3, got 4"),
        (["--eigenvalues", "31"], "--eigenvalues must be at most --num-matvecs, 30, got 31"),
        (["--directions", "1"], "--directions must be finite, at least 2, got 1"),
        (["--candidates", "best"], "--candidates"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(args, message, finished, capsys):
    assert message in refusal(sharpness.main, capsys, finished / "run0", *args)


def test_too_many_products_for_the_memory(finished, capsys, monkeypatch):
    monkeypatch.setattr("experiments.system.machine.free_bytes", lambda: 1_000_000)
    err = refusal(sharpness.main, capsys, finished / "run0", *SMALL, "--num-matvecs", 500)
    assert "--num-matvecs 500 is too many" in err
    assert "at most" in err
