"""Files that are written whole, and folders that are never overwritten."""

import pytest

from experiments.system import files


def test_text_replaces_a_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        files.write_text(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_a_csv_may_lack_columns(tmp_path):
    files.write_csv(tmp_path / "a.csv", ("x", "y"), [{"x": 1, "y": "a,b"}, {"y": 2}])
    assert files.read_csv(tmp_path / "a.csv") == [{"x": "1", "y": "a,b"}, {"x": "", "y": "2"}]


def test_only_an_empty_folder_is_new(tmp_path):
    files.check_new(tmp_path)
    files.check_new(tmp_path / "none")
    (tmp_path / "a.txt").touch()
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(FileExistsError, match="exists already and is never overwritten"):
            files.check_new(path)


def test_new_folders_have_different_names(tmp_path):
    made = []
    for _ in range(3):
        made.append(files.new_folder("run", tmp_path))
        made[-1].mkdir()
    assert len(set(made)) == 3
    assert all(path.name.startswith("run-") for path in made)


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    with (
        files.locked(tmp_path),
        pytest.raises(BlockingIOError, match="is in use by another process"),
        files.locked(tmp_path),
    ):
        raise AssertionError("a second lock")
    with files.locked(tmp_path):
        pass
