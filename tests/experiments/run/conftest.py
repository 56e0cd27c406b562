import contextlib
import os
import signal

import pytest

from experiments.system.interruption import Interruption


@pytest.fixture
def stopped_at(monkeypatch):
    """A context in which the process gets a signal before the launch of the given step."""

    @contextlib.contextmanager
    def stopped_at(step, number=signal.SIGTERM):
        noted = Interruption.noted

        def asked(self, first):
            if first >= step and self.signal is None:
                os.kill(os.getpid(), number)
            return noted(self, first)

        with monkeypatch.context() as patch:
            patch.setattr(Interruption, "noted", asked)
            yield

    return stopped_at
