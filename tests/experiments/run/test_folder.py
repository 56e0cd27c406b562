"""The files of a run."""

import json

import pytest

from experiments.run import curves
from experiments.run.folder import COLUMNS, RunFolder
from tests.experiments.rows import read_csv


def test_a_folder_with_files_is_refused(tmp_path):
    (tmp_path / "kept").touch()
    with pytest.raises(FileExistsError, match="is never overwritten"):
        RunFolder.create(tmp_path, {"seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    folder = RunFolder.create(tmp_path / "a" / "b", {"seed": 1})
    assert json.loads((folder.path / "config.json").read_text()) == {"seed": 1}


def test_metrics_start_again_with_the_epochs_of_a_checkpoint(tmp_path):
    rows = [dict.fromkeys(COLUMNS, number) for number in (1, 2)]
    for kept in (rows, rows[:1]):
        folder = RunFolder(tmp_path)
        folder.start_metrics(kept)
        folder.close()
        assert folder.metrics == kept
        assert [row["epoch"] for row in read_csv(tmp_path / "metrics.csv")] == [
            str(row["epoch"]) for row in kept
        ]
        assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_other_processes_write_nothing(tmp_path):
    folder = RunFolder(tmp_path, writes=False)
    folder.lock()
    folder.start_metrics([])
    folder.append_metrics(dict.fromkeys(COLUMNS, 1))
    folder.write_sealed({"summary.json": "{}"})
    curves.draw(folder, "title", 1)
    folder.close()
    assert len(folder.metrics) == 1
    assert not list(tmp_path.iterdir())
