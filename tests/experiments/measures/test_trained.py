"""Networks are those that were trained, with their seeds and labels."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import robustness, sharpness
from experiments.comparison.reading import read_results
from experiments.config.config import Config
from experiments.data import load
from experiments.measures.trained import trained_in
from tests.experiments.rows import read_csv
from tests.experiments.run.runs import edit
from tests.experiments.script import refusal

pytestmark = pytest.mark.usefixtures("small_mlp")
ALL = 10_000


def read(folder, *names, every_candidate=True, examples=ALL):
    folders = [folder / name for name in names]
    return trained_in(folders, examples, every_candidate=every_candidate)


def accuracies(networks):
    predict = networks.predict
    return [
        float((predict(*network, networks.test.images).argmax(-1) == labels).mean())
        for network, labels in zip(of_seeds(networks), networks.test.labels, strict=True)
    ]


def of_seeds(networks):
    both = (networks.params, networks.stats)
    return [jax.tree.map(lambda x, i=i: x[i], both) for i in range(len(networks.seeds))]


def test_networks_of_a_comparison_have_the_accuracies_of_its_results(finished):
    found, task = read(finished, "grid")
    assert task["dataset"] == "digits"
    (comparison,) = read_results(finished / "grid")
    known = {}
    for result in comparison.results:
        name = f"sam, rho {result.values['rho']:g}" if "rho" in result.values else "sgd"
        known.setdefault(name, []).append(result.test_accuracy)
    assert set(known) == {"sgd", "sam, rho 0.1", "sam, rho 0.5"}
    for networks in found:
        assert networks.seeds == (0, 1)
        np.testing.assert_allclose(accuracies(networks), known[networks.name], atol=1e-6)


def test_the_chosen_networks_of_a_comparison(finished):
    found, _ = read(finished, "grid", every_candidate=False)
    chosen = {row["method"]: row["chosen"] for row in read_csv(finished / "grid/summary.csv")}
    assert sorted(n.name for n in found) == sorted(["sgd", f"sam, {chosen['sam']}"])


def test_runs_that_differ_in_their_seed_are_together(finished):
    (networks,), _ = read(finished, "run0", "run1")
    assert (networks.name, networks.seeds) == ("bisam-log, rho 0.1", (0, 1))
    for name, accuracy in zip(("run0", "run1"), accuracies(networks), strict=True):
        summary = json.loads((finished / name / "summary.json").read_text())
        assert accuracy == pytest.approx(summary["test_accuracy"], abs=1e-6)


def test_every_seed_has_its_own_wrong_labels(finished):
    asked = Config(train_examples=128, label_noise=0.2)
    expected = [load(asked.source(seed)).train.labels for seed in (0, 1)]
    assert (expected[0] != expected[1]).any()
    for names in (["grid"], ["run0", "run1"]):
        found, _ = read(finished, *names, examples=100)
        for networks in found:
            np.testing.assert_array_equal(networks.train.labels, np.stack(expected)[:, :100])
            assert len(networks.test.images) == 100


@pytest.mark.parametrize("command", [sharpness, robustness])
def test_bad_input_is_one_line(command, finished, tmp_path, capsys):
    def refused(*args):
        return refusal(command.main, capsys, *args, "--output", tmp_path / "new")

    bare = tmp_path / "bare"
    shutil.copytree(finished / "grid", bare)
    shutil.rmtree(bare / "networks")
    assert "has no networks of" in refused(bare)
    assert "--no-keep-networks" in refused(bare)
    run = tmp_path / "run"
    shutil.copytree(finished / "run0", run)
    shutil.rmtree(run / "checkpoints")
    assert f"{run} has no checkpoints" in refused(run)
    assert "is no run folder" in refused(tmp_path / "nothing")
    assert "name the folder of a run" in refused()
    assert "--examples must be finite, at least 1" in refused(run, "--examples", 0)
    other = tmp_path / "other"
    shutil.copytree(finished / "run0", other)
    edit(other, "config.json", '"label_noise": 0.2', '"label_noise": 0.0')
    assert "another label noise" in refused(finished / "run1", other)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_there_is_left_alone(finished, tmp_path, capsys):
    (tmp_path / "kept").touch()
    err = refusal(sharpness.main, capsys, finished / "run0", "--output", tmp_path)
    assert "--output must be a new folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_damaged_network_is_named(finished, tmp_path, capsys):
    shutil.copytree(finished / "grid", tmp_path / "grid")
    part = next((tmp_path / "grid" / "networks").glob("*.json")).with_suffix("")
    for path in part.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(b"\0" * path.stat().st_size)
    err = refusal(robustness.main, capsys, tmp_path / "grid", "--candidates", "all")
    assert str(part) in err
