"""Runs on data sets prepared by TFDS, in memory and streamed."""

import shutil

import pytest

from experiments.config.config import Config
from experiments.data import DatasetError
from experiments.run.ends import StoppedRunError
from experiments.run.folder import read_config
from experiments.run.training import train
from tests.experiments import tiny_dataset
from tests.experiments.run.runs import rows_of

pytestmark = pytest.mark.usefixtures("small_mlp")

STREAMED = {"dataset": "varied", "image_size": 16}
IN_MEMORY = {"dataset": "square"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset.write(folder, "square", train=80)
    sizes = tiny_dataset.VARIED
    tiny_dataset.write(folder, "varied", train=80, sizes=sizes, encoding="jpeg")
    return folder


def config(folder, output, **options):
    defaults = {"model": "cnn", "epochs": 3, "batch_size": 8, "devices": 1}
    return Config(data_dir=folder, workers=0, output=output, **defaults | options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(STREAMED, id="streamed", marks=pytest.mark.slow),
        pytest.param(IN_MEMORY, id="in memory", marks=pytest.mark.slow),
    ],
)
def test_a_run_learns_colors(options, folder, tmp_path):
    options = options | {"crop_padding": 2, "cutout": 0.5, "method": "sgd"}
    summary = train(config(folder, tmp_path / "run", **options))
    assert summary["test_accuracy"] > 0.8
    assert summary["test_examples"] == 20
    assert summary["steps"] == 3 * (72 // 8)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        pytest.param(STREAMED, 16, id="streamed"),
        pytest.param(STREAMED, 4, id="streamed, first epoch", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(options, step, folder, tmp_path, stopped_at):
    options = options | {"method": "friendly", "model": "mlp"}
    train(config(folder, tmp_path / "whole", **options))
    with stopped_at(step):
        summary = train(config(folder, tmp_path / "stopped", **options))
    assert (summary["status"], summary["steps"]) == ("interrupted", step)
    summary = train(read_config(tmp_path / "stopped"), tmp_path / "stopped")
    assert summary["status"] == "finished"
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")


def damage(folder, keep):
    """Cuts or changes the examples of a prepared data set, not the files that describe them."""
    for path in folder.rglob("*-train.array_record-*"):
        content = bytearray(path.read_bytes())
        middle = slice(len(content) // 3, 2 * len(content) // 3)
        content[middle] = bytes(middle.stop - middle.start)
        path.write_bytes(content[: len(content) if keep else len(content) // 2])


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        pytest.param(STREAMED, True, id="streamed, changed"),
        pytest.param(STREAMED, False, id="streamed, truncated", marks=pytest.mark.slow),
        pytest.param(IN_MEMORY, True, id="in memory, changed", marks=pytest.mark.slow),
        pytest.param(IN_MEMORY, False, id="in memory, truncated", marks=pytest.mark.slow),
    ],
)
def test_damaged_data_is_one_error(options, keep, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    damage(tmp_path / "data", keep)
    with pytest.raises((DatasetError, StoppedRunError)) as caught:
        train(config(tmp_path / "data", tmp_path / "run", method="sgd", model="mlp", **options))
    assert "cannot be read, perhaps because a file of it is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)
    if caught.type is StoppedRunError:
        assert "to resume: python -m experiments.train --resume" in str(caught.value)
