"""A stopped run resumes as if it had never stopped, or says what is wrong."""

import dataclasses
import re
import shutil
import signal
from pathlib import Path

import pytest

from experiments import evaluate, seal, train
from experiments.config.config import Config
from experiments.run.folder import RunFolder, read_config
from experiments.run.training import train as run_training
from experiments.system import seals
from tests.conftest import enable_x64
from tests.experiments.run.runs import assert_same_run, edit, rows_of, saved_steps
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
    assert (summary.status, summary.steps) == ("interrupted", 14)
    assert summary.epochs_completed == len(rows_of(tmp_path / "run")) == 2
    assert summary.checkpoint_epoch == 2
    assert 0 < summary.test_accuracy <= 1
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
    edit(folder, "summary.json", '"finished"', '"started"')
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


def size_of(path):
    return path.stat().st_size


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def change_a_digit(path):
    """Changes the accuracy to another number."""
    text = path.read_text()
    changed = re.sub(r'("accuracy": 0\.)(\d)', lambda m: m[1] + str((int(m[2]) + 1) % 10), text)
    assert changed != text
    path.write_text(changed)


@pytest.mark.parametrize(
    ("which", "damage"),
    [
        pytest.param("arrays", truncate, id="truncated arrays", marks=pytest.mark.slow),
        pytest.param("about", change_a_digit, id="changed accuracy"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    damage, which, finished, unfinished, capsys
):
    *_, earlier, last = saved_steps(unfinished)
    checkpoint = unfinished / "checkpoints" / str(last)
    files = {
        "arrays": max(checkpoint.glob("state/**/d/*"), key=size_of),
        "about": checkpoint / "about" / "metadata",
    }
    damage(files[which])
    damaged = f"the checkpoint {checkpoint.resolve()} is damaged"
    result = call(evaluate.main, capsys, unfinished, "--step", last)
    assert_one_error(result, damaged)
    status, out, err = resume(capsys, unfinished)
    assert status == 0, err
    assert damaged in out
    assert f"resuming from step {earlier}\n" in out
    assert (unfinished / "damaged" / str(last)).is_dir()
    assert_same_run(unfinished, finished, 21)


def test_a_damaged_only_checkpoint_is_one_error(unfinished, capsys):
    *others, last = saved_steps(unfinished)
    for step in others:
        shutil.rmtree(unfinished / "checkpoints" / str(step))
    change_a_digit(unfinished / "checkpoints" / str(last) / "about" / "metadata")
    assert_one_error(resume(capsys, unfinished), "is damaged (what is known about it is not what")
    assert saved_steps(unfinished) == [last]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"model": "mlp"', '"model": "cnn"', "is of another network: its params.convolutions.0."),
        ('"seed": 0', '"seed": 1', "is of another run: its seed is 0, not 1"),
    ],
    ids=["model", "seed"],
)
def test_a_checkpoint_of_another_run_is_one_clear_error(old, new, message, unfinished, capsys):
    edit(unfinished, "config.json", old, new)
    assert_one_error(resume(capsys, unfinished), message)
    assert saved_steps(unfinished)[-1] == 21


def test_other_arithmetic_is_one_clear_error(unfinished, capsys):
    with enable_x64(True):
        assert_one_error(resume(capsys, unfinished), "its JAX_ENABLE_X64 is False, not True")


@pytest.mark.parametrize("name", ["config.json", "summary.json", "seal.json"])
def test_a_changed_file_is_refused_until_it_is_accepted(name, unfinished, capsys):
    path = unfinished / name
    path.write_text(path.read_text().replace("1", "2", 1))
    status, _, err = resume(capsys, unfinished)
    assert status == 2
    assert err.count("\n") == 1
    assert str(path.resolve()) in err or str(path) in err
    assert f"python -m experiments.seal {unfinished} --accept" in err
    assert call(seal.main, capsys, unfinished)[0] == 1
    assert call(seal.main, capsys, unfinished, "--accept")[0] == 0
    status, out, _ = call(seal.main, capsys, unfinished)
    assert (status, out) == (0, f"{unfinished}: as written\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run folder: it has no config.json"),
        ("{", "config.json cannot be read: Input data was truncated"),
        ("[]", "config.json cannot be read: expected an object, got []"),
        ('{"epochs": "3"}', "config.json cannot be read: Expected `int | null`, got `str`"),
        ('{"model": "big"}', "config.json cannot be read: --model: there is no model 'big'"),
        ('{"rho": 1e400}', "config.json cannot be read"),
        ('{"depth": 3}', "config.json cannot be read: unknown field 'depth'"),
    ],
    ids=["none", "damaged", "list", "text", "model", "infinite", "unknown"],
)
def test_other_folders_are_one_clear_error(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
        seals.accept(tmp_path, ["config.json"])
    assert_one_error(resume(capsys, tmp_path), message)


@pytest.mark.parametrize(
    "args", [["--epochs", "9"], ["--mu", "0.3"], ["--output", "other"]], ids=str
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
    edit(finished, "config.json", '"fsdp": 1', '"fsdp": 2')
    try:
        for args, fsdp in (([], 2), (["--fsdp", "1"], 1)):
            args = ["--resume", str(finished), *args]
            assert train.command_line.parse(train.TrainOptions, "", args).config.fsdp == fsdp
    finally:
        edit(finished, "config.json", '"fsdp": 2', '"fsdp": 1')
