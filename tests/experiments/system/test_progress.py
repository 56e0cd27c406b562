"""A progress bar, with and without a reader."""

import sys

from experiments.system import progress


class Gone:
    """A stream that nobody reads."""

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_a_reader_that_goes_away_does_not_end_the_program(monkeypatch, capsys):
    with progress.shown(2, "step", done=1) as bar:
        progress.print_line("a line")
        monkeypatch.setattr(sys, "stdout", Gone())
        bar._bar.fp = Gone()
        bar.advance(1)
        progress.print_line("another")
    monkeypatch.undo()
    assert capsys.readouterr().out == "a line\n"


def test_a_silent_bar_prints_nothing(capsys):
    with progress.shown(2, "step", silent=True) as bar:
        bar.advance(2)
    assert capsys.readouterr() == ("", "")
