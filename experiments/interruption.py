"""Ctrl-C at a place where nothing is half done."""

import signal
import sys
import threading
from typing import Any


class Interruption:
    """A context in which the first SIGINT is only noted, for the loop to ask for.

    An exception raised by the signal itself could land, and be lost, in a library's callback. A
    second SIGINT ends the program as usual. Signals can be handled in the main thread alone:
    elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, *signal_and_frame: object) -> None:
        self.requested = True
        self._restore()
        print("\ninterrupted: finishing the epoch, Ctrl-C again to stop at once", file=sys.stderr)

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
