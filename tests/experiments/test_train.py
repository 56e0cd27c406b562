"""The training script, as its users run it."""

import csv
import json
import re
import signal
import time

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments import compare, evaluate, files, launches, train
from experiments.config import Config
from experiments.experiment import Experiment
from experiments.training import keys_of
from tests.experiments.script import start

SHORT = ["--epochs", "2", "--devices", "1"]


def run(capsys, *args):
    """Exit status, standard output, standard error of the script in this process."""
    status = 0
    try:
        train.main([str(arg) for arg in args])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_no_arguments(tmp_path):
    process = start(cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    match = re.search(r"test accuracy (\d+\.\d+) % on 360 examples", out.splitlines()[-1])
    assert match
    assert float(match[1]) >= 97.0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-bisam-log-")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "metrics.csv",
        "tensorboard",
        "curves.png",
        "checkpoints",
        "summary.json",
    }
    assert len(re.findall(r"^epoch +\d+  loss .* validation .* examples/s", out, re.M)) == 50
    assert re.search(r"1950/1950 .*step/s", err)
    assert re.search(r"^compiled in \d+\.\d s", out, re.M)
    assert re.search(r"\d\.\d\d GiB at most\)", out)


@pytest.mark.usefixtures("no_run_is_timed_alone")
def test_second_gradient_beats_label_noise(tmp_path):
    args = ["--methods", "sgd", "sam", "bisam-log", "--rho", "1", "--label-noise", "0.4"]
    args += ["--seeds", "3", "--no-equal-gradients", "--output", str(tmp_path / "new")]
    compare.main(args)
    for row in files.read_csv(tmp_path / "new" / "summary.csv"):
        if row["method"] != "sgd":
            assert float(row["same_epochs_difference"]) > 0.05


@pytest.mark.parametrize(
    "args",
    [
        ["--method", "sgd", "--base", "adamw"],
        ["--method", "sam", "--rho", "0.1", "--momentum", "0.8"],
        ["--method", "asam", "--eta", "0.1", "--batch-size", "64"],
        ["--method", "bisam-tanh", "--mu", "5", "--alpha", "0.2", "--label-smoothing", "0"],
        [
            "--model",
            "cnn",
            "--label-noise",
            "0.2",
            "--weight-decay",
            "0",
            "--learning-rate",
            "0.05",
        ],
    ],
    ids=" ".join,
)
def test_options_and_run_folder(args, tmp_path, capsys):
    folder = tmp_path / "run"
    status, out, _ = run(capsys, *args, *SHORT, "--seed", "4", "--output", folder)
    assert status == 0
    config = json.loads((folder / "config.json").read_text())
    for name, value in zip(args[::2], args[1::2], strict=True):
        assert str(config[name[2:].replace("-", "_")]) in (value, value + ".0")
    assert config["seed"] == 4
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert f"test accuracy {100 * summary['test_accuracy']:.2f} %" in out.splitlines()[-1]


def test_evaluate_finds_what_the_summary_reports(tmp_path, capsys):
    folder = tmp_path / "run"
    run(capsys, "--epochs", "4", "--label-noise", "0.2", "--output", folder)
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: (float(row["validation_accuracy"]), int(row["epoch"])))
    assert int(best["epoch"]) == summary["checkpoint_epoch"]
    evaluate.main([str(folder)])
    out = capsys.readouterr().out
    assert out.startswith(f"checkpoint of step {best['step']}\n")
    results = json.loads((folder / "evaluation.json").read_text())["accuracy_and_loss"]
    assert results["test"]["accuracy"] == summary["test_accuracy"]
    assert results["validation"]["accuracy"] == float(best["validation_accuracy"])
    assert results["validation"]["loss"] == float(best["validation_loss"])
    for name, examples in (("train", 1257), ("validation", 180), ("test", 360)):
        row = results[name]
        assert row["examples"] == examples
        printed = f"accuracy {100 * row['accuracy']:6.2f} %  loss {row['loss']:.4f}"
        assert printed in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing"], "missing cannot be read as a run"),
        (["run", "--step", "7"], "--step must be a checkpoint of the run (39), got 7"),
        ([], "required"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(capsys, "--epochs", "1", "--output", "run")
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(args)
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in err
    assert err.count("\n") == 1


def test_event_files_hold_the_metrics(tmp_path, capsys):
    folder = tmp_path / "run"
    run(capsys, *SHORT, "--output", folder)
    (events,) = (folder / "tensorboard").iterdir()
    values = {}
    for event in read_events(events):
        for value in event.summary.value:
            values[value.tag, event.step] = value.simple_value
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(values) == len(rows) * 4
    for row in rows:
        for name in ("loss", "validation_accuracy", "validation_loss"):
            assert values[name, int(row["step"])] == pytest.approx(float(row[name]))


def read_events(path):
    """The records of an event file: length, checksum, content, checksum."""
    content = path.read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_same_seed_same_run(tmp_path, capsys):
    columns = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(capsys, *SHORT, "--seed", seed, "--output", tmp_path / name)
        with (tmp_path / name / "metrics.csv").open() as file:
            columns.append([row["loss"] for row in csv.DictReader(file)])
    assert columns[0] == columns[1] != columns[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "adam"], "invalid choice 'adam' for argument '--method'. Expected one of"),
        (["--epochs", "0"], "--epochs must be finite, at least 1, got 0"),
        (["--seed", "many"], "error: Error parsing --seed: invalid literal for int()"),
        (["--epochs", "many"], "error: Error parsing --epochs: no type matching {None}|INT"),
        (["--nonsense"], "error: Unrecognized options: --nonsense"),
        (["--rho", "-0.1"], "--rho must be finite, at least 0, got -0.1"),
        (["--rho", "1e39"], "--rho must be finite, at least 0, got 1e+39"),
        (["--rho", "nan"], "--rho must be finite, at least 0, got nan"),
        (["--mu", "0"], "--mu must be finite, greater than 0, got 0.0"),
        (["--sparsity", "1.5"], "--sparsity must be finite, at least 0 and at most 1, got 1.5"),
        (["--num-samples", "0"], "--num-samples must be finite, at least 1"),
        (["--gamma", "0"], "--gamma must be finite, greater than 0 and at most 1"),
        (["--method", "efficient", "--gamma", "0.01"], "--gamma leaves less than 2 examples"),
        (["--perturbation", "tanh"], "--perturbation tanh contradicts --method bisam-log"),
        (["--perturbation", "hinge"], "invalid choice 'hinge'"),
        (["--alpha", "-1"], "--alpha must be finite, greater than 0"),
        (["--eta", "-1"], "--eta must be finite, at least 0"),
        (
            ["--label-noise", "1.5"],
            "--label-noise must be finite, at least 0 and at most 1, got 1.5",
        ),
        (["--train-examples", "2000"], "train_examples must be at least 1 and at most 1257"),
        (["--model", "vgg19_bn"], "--model vgg19_bn: "),
        (["--group-size", "3"], "--group-size must divide --batch-size, got 3 and 32"),
        (["--group-size", "8", "--method", "sgd"], "--group-size has no meaning for --method sgd"),
        (["--group-size", "8", "--method", "sampa"], "cannot be used with --method sampa"),
        (["--start-step", "9", "--method", "sampa"], "contains the base optimizer"),
        (["--start-step", "9", "--method", "sgd"], "--start-step has no meaning for --method sgd"),
        (["--start-step", "-1"], "--start-step must be finite, at least 0, got -1"),
        (["--every", "0"], "--every must be finite, at least 1, got 0"),
        (["--sharpness-weight", "1"], "must be finite, at least 0 and less than 1, got 1.0"),
        (
            ["--group-size", "8", "--microbatch-size", "4"],
            "--microbatch-size must be a multiple of --group-size, got 4 and 8",
        ),
        (["--cutout", "2"], "--cutout must be finite, at least 0 and at most 1"),
        (["--preset", "bisam-imagenet"], "invalid choice 'bisam-imagenet'"),
        (["--precision", "float16"], "invalid choice 'float16'"),
        (["--resume", "missing"], "missing is no run folder"),
        (
            ["--batch-size", "1258", "--devices", "1"],
            "--batch-size must be at most the 1257 training examples",
        ),
        (["--batch-size", "1"], "--batch-size must be finite, at least 2"),
        (["--learning-rate", "inf"], "--learning-rate must be finite"),
        (["--weight-decay", "-1"], "--weight-decay must be finite"),
        (["--momentum", "-1"], "--momentum must be finite"),
        (["--label-smoothing", "2"], "--label-smoothing must be finite"),
        (["--seed", "-1"], "--seed must be finite, at least 0"),
    ],
)
def test_bad_input_is_one_line(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_missing_data_set_is_one_message_with_the_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "--dataset", "cifar10", "--data-dir", "data")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: there is no cifar10 in {tmp_path / 'data'}")
    assert "pip install tensorflow" in err
    assert f"tfds.builder('cifar10', data_dir='{tmp_path / 'data'}', file_format=" in err
    assert not list(tmp_path.iterdir())


def test_help(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for option in ("--method", "--rho", "--label-noise", "--output"):
        assert option in out


def test_an_existing_folder_is_never_overwritten(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    status, _, err = run(capsys, *SHORT, "--output", folder)
    assert status == 2
    assert "--output must be a new folder" in err
    assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    status, _, err = run(capsys, *SHORT, "--output", folder / "notes.txt" / "run")
    assert status == 2
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "args", [["--learning-rate", "1e38"], ["--learning-rate", "1e38", "--batch-size", "1257"]]
)
def test_a_non_finite_loss_stops_the_run_and_names_the_step(args, tmp_path, capsys):
    folder = tmp_path / "run"
    status, _, err = run(capsys, *SHORT, *args, "--output", folder)
    assert status == 1
    assert re.search(r"error: stopped: the loss is not finite at step \d+ \(epoch 1\)", err)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"].startswith("stopped: the loss is")
    assert summary["epochs_completed"] == 0


def test_interruption_leaves_a_readable_run(tmp_path):
    folder = tmp_path / "run"
    process = start("--epochs", 100_000, "--output", folder, cwd=tmp_path)
    metrics = folder / "metrics.csv"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["epochs_completed"] == metrics.read_text().count("\n") - 1
    assert 0.5 < summary["test_accuracy"] <= 1
    assert (folder / "curves.png").exists()


@pytest.mark.usefixtures("small_vit", "quick_compilation")
def test_every_way_to_train_is_another():
    """Options reach the step: each changes the first epoch's loss, by as much as it should."""
    mixed = {"method": "gsam", "label_smoothing": 0.0}
    vit = {"model": "vit_tiny", "train_examples": 128}
    ways = {
        "plain": {},
        "groups": {"group_size": 8},
        "groups of 4": {"group_size": 8, "microbatch_size": 16},
        "bfloat16": {"precision": "bfloat16"},
        "crop": {"crop_padding": 1},
        "flip": {"flip": True},
        "cutout": {"cutout": 0.5},
        "subset": {"train_examples": 300},
        "gsam": mixed,
        "gsam, in parts": mixed | {"microbatch_size": 16},
        "gsam, later": mixed | {"start_step": 20},
        "gsam, now and then": mixed | {"every": 2},
        "vit": vit,
        "vit, in parts": vit | {"microbatch_size": 8},
    }
    losses = {name: first_epoch(**options) for name, options in ways.items()}
    for name, loss in losses.items():
        assert np.isfinite(loss)
        assert loss < 3.5
        for other in set(ways) - {name}:
            close = abs(loss - losses[other]) < 1e-5
            # Without batch statistics, microbatches change nothing but the order of sums; and
            # they only change how much of a grouped step is done at once.
            same = {name, other} in ({"vit", "vit, in parts"}, {"groups", "groups of 4"})
            assert close == same, (name, other)
    np.testing.assert_allclose(losses["bfloat16"], losses["plain"], rtol=0.05)


def first_epoch(**options):
    experiment, losses = Experiment(Config(devices=1, **options)), []
    steps = experiment.steps_per_epoch
    launches.run(experiment.compile(), experiment.state, 0, steps, losses.extend)
    return np.mean(losses)


def test_as_many_checkpoints_as_asked_for_are_kept(tmp_path, capsys):
    args = ["--epochs", "5", "--checkpoint-every", "20", "--keep-checkpoints", "4"]
    run(capsys, *args, "--output", tmp_path / "run")
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps[-4:] == [160, 180, 195] or steps[-3:] == [160, 180, 195]
    assert len(steps) in (4, 5)


def test_who_looks_may_go_away(tmp_path):
    """With the pipes closed, a terminated run saves all the same."""
    folder = tmp_path / "run"
    process = start("--epochs", 100_000, "--checkpoint-every", 10**6, "--output", folder, cwd=".")
    while not (folder / "metrics.csv").exists() or (folder / "metrics.csv").stat().st_size < 300:
        assert process.poll() is None
        time.sleep(0.1)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    steps = {int(path.name) for path in (folder / "checkpoints").iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["steps"] == max(steps)


def test_the_seed_is_of_everything_random():
    """No key is used twice, and each depends on the seed."""
    keys = []
    for seed in (0, 1):
        parts = Experiment(Config(method="tilted", seed=seed))
        method_keys = [
            leaf
            for leaf in jax.tree.leaves(parts.state.method)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        ]
        assert len(method_keys) == 1
        keys += [str(key) for key in (*method_keys, *keys_of(parts.state))]
        keys += [str(parts.state.params["head"]["kernel"])]
    assert len(set(keys)) == 2 * 5
