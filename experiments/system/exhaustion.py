"""Commands that end in one line if the machine gives no more: a full disk, a closed pipe."""

import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_NUMBERS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.EIO,
)
_TEXTS = tuple(map(os.strerror, _NUMBERS))


class ExhaustedError(Exception):
    """The machine gave no more. The message says what, what is kept, and how to go on."""


def what_is_exhausted(error: BaseException) -> str | None:
    """Returns what the machine did not give, such as "No space left on device"; None if it did.

    Libraries put the system's error into the text of their own ones.
    """
    for known in _chain(error):
        if isinstance(known, OSError) and known.errno in _NUMBERS:
            place = f": {known.filename}" if known.filename else ""
            return f"{os.strerror(known.errno)}{place}"
        for text in _TEXTS:
            if text in str(known):
                return text
    return None


def run(main: Callable[[], None]) -> None:
    """Runs a command. All commands are started by this.

    If its output cannot be written, the command goes on without, and says so at its end.
    """
    output = _Output(sys.stdout)
    sys.stdout = output  # type: ignore[assignment]
    _silence_other_threads()
    status: Any = 0
    try:
        main()
    except SystemExit as exit_:
        status = exit_.code
    except Exception as error:
        what = str(error) if isinstance(error, ExhaustedError) else what_is_exhausted(error)
        if what is None:
            sys.excepthook = sys.__excepthook__
            raise
        _end(f"error: {what}", 1)
    output.flush()
    if output.error is not None:
        _end(f"error: standard output cannot be written: {output.error.strerror}", status or 1)
    sys.exit(status)


def _end(message: str, status: int) -> None:
    """Ends at once: at a usual end, threads of libraries would print their own errors."""
    try:
        print(message, file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _silence_other_threads() -> None:
    """Keeps threads of libraries from printing what the main thread says in one line."""
    of_threads = threading.excepthook

    def in_thread(args: Any) -> None:
        if args.exc_value is None or what_is_exhausted(args.exc_value) is None:
            of_threads(args)

    threading.excepthook = in_thread
    # Callbacks of tensorstore, which Python does not call, come here.
    sys.excepthook = lambda kind, error, trace: None
    sys.unraisablehook = lambda unraisable: None
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class _Output:
    """Standard output, until it cannot be written.

    Attributes:
        error: why it cannot.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, write: Callable[[], Any]) -> None:
        if self.error is not None:
            return
        try:
            write()
        except OSError as error:
            self.error = error
            # What is left in the buffer would be an error at the end of Python.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
