import sys

from experiments import progress


class Gone:
    """Nobody reads."""

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_who_looks_may_go_away(monkeypatch, capsys):
    with progress.shown(2, "step", done=1) as bar:
        progress.write("a line")
        monkeypatch.setattr(sys, "stdout", Gone())
        bar._bar.fp = Gone()
        bar.advance(1)
        progress.write("another")
    monkeypatch.undo()
    assert capsys.readouterr().out == "a line\n"


def test_silence(capsys):
    with progress.shown(2, "step", silent=True) as bar:
        bar.advance(2)
    assert capsys.readouterr() == ("", "")
