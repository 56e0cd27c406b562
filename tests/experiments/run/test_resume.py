"""A stopped run resumes as if it had never stopped, or says what is wrong."""

import dataclasses
import re
import shutil
import signal
from pathlib import Path

import pytest

from experiments import evaluate, train
from experiments.config.config import Config
from experiments.run.folder import RunFolder, read_config
from experiments.run.training import train as run_training
from tests.experiments.run.runs import assert_same_run, rows_of, saved_steps
from tests.experiments.script import call

pytestmark = [
    # When one file is damaged, orbax's reads of the others end after their event loop.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
    ),
]
small = pytest.mark.usefixtures("small_mlp")

# 3 epochs of 7 steps.
SHORT = {"epochs": 3, "batch_size": 8, "train_examples": 60, "devices": 1, "learning_rate": 0.02}


def config(output, **options):
    return Config(output=output, **SHORT | options)


@small
def test_a_stopped_run_ends_as_one_that_never_stopped(tmp_path, stopped_at, capsys):
    """Also if the last checkpoints are lost, and with them an epoch in metrics.csv."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    # 3 epochs of 30 steps in launches of at most 20.
    options = {"method": "look", "label_noise": 0.2, "batch_size": 4, "train_examples": 120}
    options |= {"checkpoint_every": 29, "keep_checkpoints": 4}
    run_training(config(whole, **options))
    with stopped_at(70):
        summary = run_training(config(stopped, **options))
    assert (summary["status"], summary["steps"]) == ("interrupted", 80)
    assert saved_steps(stopped)[-1] == 80
    assert len(rows_of(stopped)) == 2
    for step in saved_steps(stopped):
        if step > 58:
            shutil.rmtree(stopped / "checkpoints" / str(step))
    run_training(read_config(stopped), stopped)
    assert "resuming from step 58\n" in capsys.readouterr().out
    assert_same_run(stopped, whole, 90)


@small
def test_ctrl_c_saves_and_tests_the_best_checkpoint(tmp_path, stopped_at):
    with stopped_at(8, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        run_training(config(tmp_path / "run", method="sgd"))
    summary = RunFolder(tmp_path / "run").read_summary()
    assert (summary["status"], summary["steps"]) == ("interrupted", 14)
    assert summary["epochs_completed"] == len(rows_of(tmp_path / "run")) == 2
    assert summary["checkpoint_epoch"] == 2
    assert 0 < summary["test_accuracy"] <= 1
    assert (tmp_path / "run" / "curves.png").exists()


_finished = []


@pytest.fixture
def finished(tmp_path_factory):
    """A run that is finished, the same for all tests; arrays take most of its checkpoints."""
    if not _finished:
        folder = tmp_path_factory.mktemp("finished") / "run"
        run_training(config(folder))
        _finished.append(folder)
    return _finished[0]


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the run that says that it did not end."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    summary = folder / "summary.json"
    summary.write_text(summary.read_text().replace('"finished"', '"started"'))
    return folder


def resume(capsys, folder, *args):
    return call(train.main, capsys, "--resume", folder, *args)


def assert_one_error(result, message):
    status, _, err = result
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    status, out, _ = resume(capsys, finished)
    assert status == 0
    assert "compiled" not in out
    assert re.search(r"^test accuracy \d", out, re.M)
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


def test_a_run_in_use_is_left_to_its_process(unfinished, capsys):
    folder = RunFolder(unfinished)
    folder.lock()
    result = resume(capsys, unfinished)
    folder.close()
    assert_one_error(result, "is in use by another process")


@small
def test_a_run_in_progress_holds_the_lock(tmp_path, monkeypatch):
    """Another process cannot resume it while it trains."""
    from experiments.run import training

    refused = []

    class Run(training.Run):
        def train(self, interruption):
            with pytest.raises(BlockingIOError, match="is in use by another process"):
                RunFolder(tmp_path / "run").lock()
            refused.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "Run", Run)
    with pytest.raises(KeyboardInterrupt):
        run_training(config(tmp_path / "run", method="sgd"))
    assert refused
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    folder.close()


def test_evaluation_leaves_an_unfinished_save_as_it_is(unfinished, capsys):
    under_way = unfinished / "checkpoints" / "99.orbax-checkpoint-tmp"
    under_way.mkdir()
    evaluate.main([str(unfinished)])
    out, err = capsys.readouterr()
    assert "accuracy" in out
    assert err == ""
    assert under_way.exists()


def test_without_a_damaged_checkpoint_the_run_resumes_from_an_earlier_one(unfinished, capsys):
    *_, earlier, last = saved_steps(unfinished)
    checkpoint = unfinished / "checkpoints" / str(last)
    truncate(max(checkpoint.glob("state/**/d/*"), key=size_of))
    assert_one_error(resume(capsys, unfinished), f"{last} is damaged")
    shutil.rmtree(checkpoint)
    status, out, err = resume(capsys, unfinished)
    assert status == 0, err
    assert f"resuming from step {earlier}\n" in out
    assert re.search(r"^test accuracy \d", out, re.M)


def size_of(path):
    return path.stat().st_size


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("which", "damage"),
    [
        pytest.param("arrays", truncate, id="truncated arrays"),
        pytest.param("arrays", change_a_byte, id="changed arrays"),
        pytest.param("arrays", Path.unlink, id="missing arrays", marks=pytest.mark.slow),
        pytest.param("metadata", truncate, id="truncated metadata"),
        pytest.param("metadata", change_a_byte, id="changed metadata", marks=pytest.mark.slow),
        pytest.param("metadata", Path.unlink, id="missing metadata", marks=pytest.mark.slow),
        pytest.param("progress", truncate, id="truncated progress", marks=pytest.mark.slow),
        pytest.param("progress", change_a_byte, id="changed progress", marks=pytest.mark.slow),
        pytest.param("progress", Path.unlink, id="missing progress"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(damage, which, unfinished, capsys):
    checkpoint = unfinished / "checkpoints" / str(saved_steps(unfinished)[-1])
    files = {
        "arrays": max(checkpoint.glob("state/**/d/*"), key=size_of),
        "metadata": checkpoint / "state" / "_METADATA",
        "progress": checkpoint / "progress" / "metadata",
    }
    damage(files[which])
    message = f"the checkpoint {checkpoint.resolve()} is damaged or of another run"
    assert_one_error(resume(capsys, unfinished), message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"model": "mlp"', '"model": "cnn"', "is damaged or of another run"),
        ('"seed": 0', '"seed": 1', "is of another run: its seed is 0, not 1"),
        ('"rho": 0.05', '"rho": 0.06', "is of another run: its rho is 0.05, not 0.06"),
    ],
    ids=["model", "seed", "rho"],
)
def test_a_checkpoint_of_another_run_is_one_clear_error(old, new, message, unfinished, capsys):
    saved = unfinished / "config.json"
    assert old in saved.read_text()
    saved.write_text(saved.read_text().replace(old, new))
    assert_one_error(resume(capsys, unfinished), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run folder: it has no config.json"),
        ("{", "config.json is damaged"),
        ("[]", "it holds no configuration"),
        ('{"epochs": 3}', "it is of another version: alpha, attack_radius, base"),
    ],
    ids=["none", "damaged", "list", "other version"],
)
def test_other_folders_are_one_clear_error(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert_one_error(resume(capsys, tmp_path), message)


@pytest.mark.parametrize(
    "args", [["--epochs", "9"], ["--rho", "0.3"], ["--output", "other"]], ids=str
)
def test_resume_takes_no_other_options(args, finished, capsys):
    message = "error: --resume takes the run's own options: remove all other options but --data-dir"
    assert_one_error(resume(capsys, finished, *args), message)


def test_a_run_resumes_on_other_devices(finished):
    """Also with the values that are the defaults."""
    changed = ["--parallelism", "shard_map", "--devices", "4", "--data-dir", "there"]
    options = train.command_line.parse(
        train.TrainOptions, "", ["--resume", str(finished), *changed]
    )
    places = {"parallelism": "shard_map", "devices": 4, "data_dir": Path("there")}
    assert options.config == dataclasses.replace(read_config(finished), **places)
    saved = finished / "config.json"
    text = saved.read_text()
    try:
        saved.write_text(re.sub(r'"fsdp": 1', '"fsdp": 2', text))
        for args, fsdp in (([], 2), (["--fsdp", "1"], 1)):
            args = ["--resume", str(finished), *args]
            assert train.command_line.parse(train.TrainOptions, "", args).config.fsdp == fsdp
    finally:
        saved.write_text(text)
