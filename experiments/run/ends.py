"""How a run can end before its last step, as exceptions."""

from typing import Any


class StoppedRunError(Exception):
    """A run cannot go on. :attr:`why` says why; the message also says what to do."""

    def __init__(self, why: str, how: str) -> None:
        super().__init__(f"{why}; {how}")
        self.why = why


class NonFiniteLossError(StoppedRunError):
    """The loss or a parameter became infinite or NaN."""


class InterruptedRunError(KeyboardInterrupt):
    """A run was interrupted and saved. :attr:`summary` is what :meth:`Run.finish` returns."""

    def __init__(self, summary: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.summary = summary
