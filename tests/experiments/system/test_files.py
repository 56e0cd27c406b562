"""Files that are written whole, and folders that are never overwritten."""

import pytest

from experiments.system import files
from tests.experiments.rows import read_csv


def test_text_replaces_a_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        files.write_text(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_a_csv_may_lack_columns(tmp_path):
    files.write_csv(tmp_path / "a.csv", ("x", "y"), [{"x": 1, "y": "a,b"}, {"y": 2}])
    assert read_csv(tmp_path / "a.csv") == [{"x": "1", "y": "a,b"}, {"x": "", "y": "2"}]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="link"):
        files.read_bytes(tmp_path / "link")
    with pytest.raises(OSError, match="link"):
        files.append_text(tmp_path / "link", "lost")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "other").read_text() == "kept"
    assert not (tmp_path / "link").is_symlink()
    (tmp_path / "link").unlink()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "link").symlink_to(tmp_path)
    with pytest.raises(OSError, match="part/link is a symbolic link"), files.locked(tmp_path):
        raise AssertionError("a folder with a link")


def test_remains_of_a_killed_process_are_removed(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    (tmp_path / ".a.txt.0123.tmp").touch()
    with files.locked(tmp_path):
        assert not list(tmp_path.iterdir())
    files.write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_only_an_empty_folder_is_new(tmp_path):
    files.check_new(tmp_path)
    files.check_new(tmp_path / "none")
    (tmp_path / "a.txt").touch()
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(FileExistsError, match="exists already and is never overwritten"):
            files.check_new(path)


def test_new_folders_have_different_names(tmp_path):
    made = [files.new_folder("run", tmp_path) for _ in range(3)]
    assert len(set(made)) == 3
    assert set(tmp_path.iterdir()) == set(made)
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
