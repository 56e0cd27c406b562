import os
import signal

from experiments.interruption import Interruption


def test_one_within_another():
    """A signal to a run of a comparison stops the comparison too; the next one ends both."""
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as outer:
        with Interruption() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == before
        assert inner.signal == outer.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_to_the_outer_one_is_its_own():
    with Interruption() as outer:
        with Interruption() as inner:
            pass
        os.kill(os.getpid(), signal.SIGINT)
    assert (inner.signal, outer.signal) == (None, signal.SIGINT)
