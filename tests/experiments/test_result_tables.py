"""The command that rewrites the tables and the plot in docs/."""

from pathlib import Path

import pytest

from experiments import result_tables
from experiments.comparison import documents
from experiments.system import files

ROOT = Path(__file__).parents[2]


def test_tables_show_the_results_that_are_there():
    updated = documents.updated(ROOT)
    assert [path.relative_to(ROOT).as_posix() for path in updated] == [
        "docs/wrong-labels.svg",
        "docs/results.md",
        "docs/comparing.md",
        "docs/pays.md",
    ]
    # Another version of matplotlib draws other paths.
    for path, text in list(updated.items())[1:]:
        assert path.read_text() == text
        assert text.count("| --- ") > 1


def test_tables_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(result_tables, "ROOT", tmp_path)
    monkeypatch.setattr(result_tables, "updated", lambda root: {root / "README.md": "new"})
    (tmp_path / "README.md").write_text("old")
    result_tables.main([])
    assert (tmp_path / "README.md").read_text() == "new"
    assert "README.md" in capsys.readouterr().out


def test_help_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(files, "write_text", None)
    with pytest.raises(SystemExit) as exit_:
        result_tables.main(["--help"])
    assert exit_.value.code == 0
    assert "results/" in capsys.readouterr().out
