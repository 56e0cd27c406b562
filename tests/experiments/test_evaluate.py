"""The evaluation script, as its users run it."""

import json

import pytest

from experiments import evaluate
from experiments.config.config import Config
from experiments.run.training import train
from tests.experiments.rows import read_csv
from tests.experiments.script import refusal

pytestmark = pytest.mark.usefixtures("small_mlp")


def test_an_evaluation_finds_what_the_summary_reports(tmp_path, capsys):
    folder = tmp_path / "run"
    options = {"epochs": 4, "label_noise": 0.2, "method": "sgd", "train_examples": 300}
    summary = train(Config(output=folder, checkpoint_every=9, **options, devices=1))
    rows = read_csv(folder / "metrics.csv")
    best = max(rows, key=lambda row: (float(row["validation_accuracy"]), int(row["epoch"])))
    assert int(best["epoch"]) == summary["checkpoint_epoch"]
    capsys.readouterr()
    evaluate.main([str(folder)])
    out = capsys.readouterr().out
    assert out.startswith(f"checkpoint of step {best['step']}\n")
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved["step"] == int(best["step"])
    results = saved["accuracy_and_loss"]
    assert results["test"]["accuracy"] == summary["test_accuracy"]
    assert results["validation"]["accuracy"] == float(best["validation_accuracy"])
    assert results["validation"]["loss"] == float(best["validation_loss"])
    for name, examples in (("train", 300), ("validation", 180), ("test", 360)):
        row = results[name]
        assert row["examples"] == examples
        printed = f"accuracy {100 * row['accuracy']:6.2f} %  loss {row['loss']:.4f}"
        assert printed in out

    evaluate.main([str(folder), "--step", "36", "--devices", "8"])
    assert capsys.readouterr().out.startswith("checkpoint of step 36\n")
    other = json.loads((folder / "evaluation.json").read_text())["accuracy_and_loss"]
    assert other["validation"]["accuracy"] == float(rows[-1]["validation_accuracy"])

    assert "(27, 36), got 7" in failure(capsys, str(folder), "--step", "7")


def failure(capsys, *args):
    return refusal(evaluate.main, capsys, *args)


def test_folders_that_cannot_be_evaluated_are_one_line(tmp_path, capsys):
    assert "required" in failure(capsys)
    missing = tmp_path / "missing"
    assert f"{missing} is no run folder: it has no config.json" in failure(capsys, str(missing))
