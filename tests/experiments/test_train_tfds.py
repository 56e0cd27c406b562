"""The training script on data sets that TFDS prepared."""

import csv
import dataclasses
import signal

import pytest

from experiments import train
from experiments.config import Config
from tests.experiments import tiny_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset.write(folder, "square", train=80)
    sizes = tiny_dataset.VARIED
    tiny_dataset.write(folder, "varied", train=80, sizes=sizes, encoding="jpeg")
    return folder


def config(folder, output, **options):
    defaults = {"dataset": "varied", "image_size": 16, "model": "cnn", "epochs": 3, "batch_size": 8}
    here = {"data_dir": folder, "workers": 0, "output": output, "devices": 1}
    return Config(**defaults | here | options)


def rows_of(run):
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["examples_per_second"]
    return rows


class InterruptedAfter:
    """A termination that comes with the `asked`th launch."""

    def __init__(self, asked):
        self.left = asked

    def __call__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def noted(self, step):
        return self.signal is not None

    @property
    def signal(self):
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None


@pytest.mark.parametrize("options", [{}, {"dataset": "square", "image_size": None}], ids=str)
def test_it_learns_colours(options, folder, tmp_path):
    summary = train.train(config(folder, tmp_path / "run", crop_padding=2, cutout=0.5, **options))
    assert summary["test_accuracy"] > 0.8
    assert summary["test_examples"] == 20
    assert summary["steps"] == 3 * (72 // 8)


def test_worker_processes_change_nothing(folder, tmp_path):
    for workers in (0, 1):
        train.train(config(folder, tmp_path / str(workers), workers=workers, epochs=1))
    assert rows_of(tmp_path / "0") == rows_of(tmp_path / "1")


@pytest.mark.parametrize("options", [{}, {"dataset": "square", "image_size": None}], ids=str)
@pytest.mark.parametrize("asked", [7, 25])
def test_a_terminated_run_goes_on(asked, options, folder, tmp_path, monkeypatch):
    options = options | {"method": "friendly"}
    train.train(config(folder, tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        patch.setattr(train, "Interruption", InterruptedAfter(asked))
        summary = train.train(config(folder, tmp_path / "stopped", **options))
    assert summary["status"] == "interrupted"
    assert 0 < summary["steps"] < 27
    assert summary["steps"] % 9
    resumed = train.load_config(tmp_path / "stopped")
    resumed = dataclasses.replace(resumed, data_dir=folder)
    summary = train.train(resumed, tmp_path / "stopped")
    assert summary["status"] == "finished"
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
