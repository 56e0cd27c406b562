"""Ctrl-C and termination, handled only where no work is half done."""

import contextlib
import os
import signal
import threading
from typing import Any

from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context that only notes the first SIGINT or SIGTERM, for the loop to ask about.

    An exception raised by the signal itself could be lost in a library's callback. A second signal
    ends the program as usual. If contexts are nested, all of them note the signal. Python handles
    signals only in the main thread: in another thread this does nothing.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def noted(self, step: int) -> bool:
        """Returns whether a signal came. The loop asks before each launch, with its first step."""
        return self.signal is not None

    def _note(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number)
        outer = getattr(self._previous.get(self.signal), "__self__", None)
        self._restore()
        if isinstance(outer, Interruption):
            outer._note(number, frame)
            return
        # Not print: the signal may come within another write, or after the reader has gone.
        with contextlib.suppress(OSError):
            os.write(2, b"\ninterrupted: saving; send the signal again to stop at once\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class SharedInterruption(Interruption):
    """An interruption of several processes: a SIGTERM to one stops all after the same launch.

    JAX notes the signal and tells the other processes. Ctrl-C ends a process as usual, which ends
    the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next: int | None = None

    def __enter__(self) -> "SharedInterruption":
        return self

    def noted(self, step: int) -> bool:
        """See :class:`Interruption`. Every process must ask at the same steps."""
        # JAX says yes at only one step, the same in all processes. Orbax asks too, with the step
        # that it saves. So this asks for every step since the last launch.
        first = step if self._next is None else self._next
        reached = map(multihost_utils.reached_preemption_sync_point, range(first, step + 1))
        if any(list(reached)):
            self.signal = signal.SIGTERM
        self._next = step + 1
        return self.signal is not None
