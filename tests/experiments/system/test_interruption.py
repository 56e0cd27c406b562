"""Signals that come while a run is under way."""

import os
import signal

from experiments.system.interruption import Interruption


def test_nested_interruptions_note_the_same_signal():
    """A signal to a run of a comparison stops the comparison too; the next one ends both."""
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as outer:
        with Interruption() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == before
        assert inner.signal == outer.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_later_signal_is_only_for_the_outer_interruption():
    with Interruption() as outer:
        with Interruption() as inner:
            pass
        os.kill(os.getpid(), signal.SIGINT)
    assert (inner.signal, outer.signal) == (None, signal.SIGINT)
