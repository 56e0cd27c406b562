"""The training script, as its users run it."""

import json
import math
import re
import signal
import time

import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from experiments import evaluate, train
from tests.experiments.rows import read_csv
from tests.experiments.script import call, start

# 2 epochs of 4 steps.
SHORT = ["--epochs", 2, "--train-examples", 128, "--devices", 1]
FILES = ["checkpoints", "config.json", "curves.png", "metrics.csv", "seal.json", "summary.json"]
FILES += ["tensorboard"]

with_small_mlp = pytest.mark.usefixtures("small_mlp")


def run(capsys, *args):
    return call(train.main, capsys, *args)


@pytest.mark.optimized
def test_20_epochs_of_the_defaults_learn_the_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "--devices", 1, "--epochs", 20)
    assert status == 0, err
    match = re.search(r"test accuracy (\d+\.\d+) % on 360 examples", out)
    assert match
    assert float(match[1]) >= 97.0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-bisam-log-")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert len(re.findall(r"^epoch +\d+  loss .* validation .* examples/s", out, re.M)) == 20
    assert err == ""  # a bar is for terminals
    assert re.search(r"^compiled in \d+\.\d s", out, re.M)
    assert re.search(r"^took .* \d\.\d\d GiB at most", out, re.M)
    run_folder = folder.relative_to(tmp_path)
    assert out.splitlines()[-2].split() == ["curves", str(run_folder / "curves.png")]
    assert out.splitlines()[-1].endswith(f"tensorboard --logdir {run_folder / 'tensorboard'}")


@with_small_mlp
def test_options_reach_the_files_of_a_run(tmp_path, capsys):
    args = ["--method", "bisam-tanh", "--mu", "5", "--alpha", "0.2", "--base", "adamw"]
    args += ["--label-smoothing", "0", "--weight-decay", "0", "--learning-rate", "0.05"]
    folder = tmp_path / "run"
    status, out, err = run(capsys, *args, *SHORT, "--seed", "4", "--output", folder)
    assert status == 0, err
    config = json.loads((folder / "config.json").read_text())
    for name, value in zip(args[::2], args[1::2], strict=True):
        assert str(config[name[2:].replace("-", "_")]) in (value, value + ".0")
    # All options have a value, except hyperparameters of other methods.
    assert (config["seed"], config["rho"], config["momentum"]) == (4, 0.05, None)
    assert (config["checkpoint_every"], config["batch_size"], config["flip"]) == (40, 32, False)
    rows = read_csv(folder / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "4"), ("2", "8")]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["epochs"]) == ("finished", 8, 2)
    assert (summary["steps_per_epoch"], summary["devices"], summary["processes"]) == (4, 1, 1)
    assert f"test accuracy {100 * summary['test_accuracy']:.2f} %" in out

    # The event files hold the same numbers, and the hyperparameters.
    values = {
        (value.tag, event.step): value
        for events in (folder / "tensorboard").iterdir()
        for event in read_events(events)
        for value in event.summary.value
    }
    for row in rows:
        for name in ("loss", "validation_accuracy", "validation_loss", "learning_rate", "rho"):
            written = values[name, int(row["step"])].simple_value
            assert written == pytest.approx(float(row[name]))
    assert values["test_accuracy", 0].simple_value == pytest.approx(summary["test_accuracy"])
    start_info = values["_hparams_/session_start_info", 0].metadata.plugin_data.content
    assert b"bisam-tanh" in start_info
    # A cosine from 0.05 to 0 over 8 steps.
    rates = [0.05 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (3, 7)]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(rates, rel=1e-5)
    assert [float(row["rho"]) for row in rows] == [0.05, 0.05]


def read_events(path):
    """The records of an event file: length, checksum, content, checksum."""
    content = path.read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


MODEL = """
from flax import nnx

class Flat(nnx.Module):
    def __init__(self, image_shape, classes, *, dtype, rngs):
        height, width, channels = image_shape
        self.linear = nnx.Linear(height * width * channels, classes, dtype=dtype, rngs=rngs)

    def __call__(self, images, *, train, keys=None):
        return self.linear(images.reshape(len(images), -1))
"""


@with_small_mlp
def test_own_images_and_an_own_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_model.py").write_text(MODEL)
    for shade, name in enumerate(("dark", "light")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(40):
            image = Image.new("L", (4, 4), 100 + 100 * shade + number)
            image.save(tmp_path / "photos" / name / f"{number}.png")
    args = ["--dataset", "./photos", "--model", "own_model:Flat", "--epochs", 5, "--batch-size", 8]
    status, out, err = run(capsys, *args, "--devices", 1, "--output", "run")
    assert status == 0, err
    assert "test accuracy 100.00 % on 16 examples" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["dataset"] == str(tmp_path / "photos")
    assert config["model"] == "own_model:Flat"
    # The run is found from another folder.
    monkeypatch.chdir(tmp_path / "photos")
    status, out, err = call(evaluate.main, capsys, tmp_path / "run")
    assert status == 0, err
    assert "test        accuracy 100.00 %" in out


@with_small_mlp
def test_the_same_seed_gives_the_same_run(tmp_path, capsys):
    columns = []
    for name in ("a", "b"):
        run(capsys, *SHORT, "--method", "sgd", "--output", tmp_path / name)
        columns.append([row["loss"] for row in read_csv(tmp_path / name / "metrics.csv")])
    assert columns[0] == columns[1]
    assert len(columns[0]) == 2


@with_small_mlp
def test_a_preset_is_a_start_for_the_command_line(tmp_path, capsys):
    """Its values are overridden, saved and printed."""
    options = ["--dataset", "digits", "--model", "mlp", "--epochs", "1", "--crop-padding", "1"]
    options += ["--devices", "1"]
    output = ["--output", tmp_path / "run"]
    preset = ["--preset", "bisam-tanh-cifar100"]
    status, out, err = run(capsys, "--rho", "0.2", *preset, *options, *output)
    assert status == 0, err
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["method"], saved["rho"], saved["mu"]) == ("bisam-tanh", 0.2, 10.0)
    assert (saved["epochs"], saved["batch_size"], saved["cutout"]) == (1, 128, 0.5)
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "--" in line}
    assert table["--method"] == ["bisam-tanh", "bisam-log"]
    assert table["--rho"] == ["0.2", "0.05"]
    assert table["--epochs"] == ["1", "50"]
    assert {"--cutout", "--preset", "--dataset", "--mu"} & set(table) == {"--cutout"}
    assert f"all options: {tmp_path / 'run' / 'config.json'}" in out


def test_help_shows_the_values_of_a_preset(capsys):
    status, out, _ = run(capsys, "--preset", "sam-cifar100", "--help")
    assert not status
    for text in ("--preset NAME", "resnet56", "bisam-cifar10", "--label-noise", "--output"):
        assert text in out


# tests/experiments/config has every option; here is one of each kind.
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "adam"], "invalid choice 'adam' for argument '--method'. Expected one of"),
        (["--method", "bisan-log"], "Did you mean bisam-log?"),
        (["--methd", "sam"], "Unrecognized options: --methd, sam. Did you mean --method?"),
        (["--model", "resnt20"], "there is no model 'resnt20'"),
        (["--dataset", "digitz"], "Did you mean digits?"),
        (["--dataset", "./nowhere"], "there is no folder /"),
        (["--method", "sgd", "--rho", "0.1"], "--rho has no meaning for --method sgd"),
        (["--method", "sam", "--mu", "2"], "--mu has no meaning for --method sam"),
        (["--base", "adamw", "--momentum", "0"], "--momentum has no meaning for --method bisam"),
        (["--method", "sgd", "--perturbation", "log"], "nothing is ascended"),
        (["--seed", "many"], "error: Error parsing --seed: invalid literal for int()"),
        (["--epochs", "many"], "error: Error parsing --epochs: no type matching INT"),
        (["--nonsense"], "error: Unrecognized options: --nonsense"),
        (["--rho", "nan"], "error: --rho must be finite, at least 0, got nan"),
        (["--learning-rate", "inf"], "error: --learning-rate must be finite, at least 0, got inf"),
        (["--perturbation", "hinge"], "invalid choice 'hinge'"),
        (["--train-examples", "2000"], "train_examples must be at least 1 and at most 1257"),
        (["--model", "vgg19_bn"], "--model vgg19_bn: image_shape must be"),
        (["--group-size", "3"], "--group-size must divide --batch-size, got 3 and 32"),
        (["--preset", "bisam-imagenet"], "invalid choice 'bisam-imagenet'"),
        (["--precision", "float16"], "invalid choice 'float16'"),
        (["--resume", "missing"], "missing is no run folder: it has no config.json"),
        (
            ["--batch-size", "1258", "--devices", "1"],
            "--batch-size must be at most the 1257 training examples, got 1258",
        ),
        (
            ["--distributed", "--num-processes", "2"],
            "--coordinator-address, --num-processes and --process-id belong together",
        ),
        (
            ["--num-processes", "2"],
            "--coordinator-address, --num-processes and --process-id need --distributed",
        ),
        (["--heartbeat-timeout", "0"], "--heartbeat-timeout must be at least 1, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
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
    assert err.startswith("error: there is no cifar10 in data: prepare it once")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_never_overwritten(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for output in (folder, folder / "notes.txt" / "run"):
        status, _, err = run(capsys, *SHORT, "--output", output)
        assert status == 2
        assert "--output must be a" in err
        assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@with_small_mlp
@pytest.mark.parametrize("examples", [128, 32], ids=["between steps", "after the last step"])
def test_a_non_finite_loss_stops_the_run_and_names_the_step(examples, tmp_path, capsys):
    folder = tmp_path / "run"
    args = ["--epochs", 1, "--train-examples", examples, "--devices", 1, "--method", "sgd"]
    status, _, err = run(capsys, *args, "--learning-rate", "1e38", "--output", folder)
    assert status == 1
    what = "the loss" if examples == 128 else "a logit"
    assert f"error: stopped: {what} is not finite after step 1 (epoch 1); start again with" in err
    assert err.endswith("with a smaller --learning-rate\n")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == f"stopped: {what} is not finite after step 1 (epoch 1)"
    assert summary["epochs_completed"] == 0


@pytest.mark.slow
def test_a_signal_saves_even_if_nobody_reads_the_output(tmp_path):
    folder = tmp_path / "run"
    process = start("--epochs", 100_000, "--checkpoint-every", 10**6, "--output", folder, cwd=".")
    while not (folder / "metrics.csv").exists() or (folder / "metrics.csv").stat().st_size < 300:
        assert process.poll() is None
        time.sleep(0.1)
    try:
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["epochs_completed"] == len(read_csv(folder / "metrics.csv"))
    assert summary["steps"] == max(int(path.name) for path in (folder / "checkpoints").iterdir())
