"""Ctrl-C and termination at a place where nothing is half done."""

import contextlib
import os
import signal
import threading
from typing import Any

from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context in which the first SIGINT or SIGTERM is only noted, for the loop to ask for.

    An exception raised by the signal itself could land, and be lost, in a library's callback. A
    second signal ends the program as usual. Of one within another both note it. Signals can be
    handled in the main thread alone: elsewhere this does nothing.

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
        """Whether a signal came; asked before each launch, with the step it begins at."""
        return self.signal is not None

    def _note(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number)
        outer = getattr(self._previous.get(self.signal), "__self__", None)
        self._restore()
        if isinstance(outer, Interruption):
            outer._note(number, frame)
            return
        # Not print: it could be in the middle of another write, and who reads may be gone.
        with contextlib.suppress(OSError):
            os.write(2, b"\ninterrupted: saving; once more to stop at once\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class SharedInterruption(Interruption):
    """The same for several processes: a SIGTERM to one of them stops all after the same launch.

    JAX notes it and tells the others. Ctrl-C ends a process as usual, and so the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next: int | None = None

    def __enter__(self) -> "SharedInterruption":
        return self

    def noted(self, step: int) -> bool:
        """See :class:`Interruption`; every process must ask at the same steps."""
        # JAX says yes at one step alone, the same in all processes, and orbax asks it as well, with
        # the step that it saves: so ask for every step since the last launch.
        first = step if self._next is None else self._next
        reached = map(multihost_utils.reached_preemption_sync_point, range(first, step + 1))
        if any(list(reached)):
            self.signal = signal.SIGTERM
        self._next = step + 1
        return self.signal is not None
