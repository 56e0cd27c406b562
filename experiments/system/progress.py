"""A progress bar. A reader that goes away does not end the program."""

import contextlib
import sys
from collections.abc import Iterator

import tqdm


class Bar:
    """A bar on standard error. :func:`shown` makes one."""

    def __init__(self, bar: tqdm.tqdm) -> None:
        self._bar = bar

    def advance(self, count: int) -> None:
        """Adds `count` finished units."""
        with contextlib.suppress(OSError):
            self._bar.update(count)


@contextlib.contextmanager
def shown(total: int, unit: str, *, done: int = 0, silent: bool = False) -> Iterator[Bar]:
    """Yields a bar of `total` units, of which `done` are finished.

    There is none if standard error is no terminal, or if it is to be silent.
    """
    disable = True if silent else None
    bar = tqdm.tqdm(
        total=total, initial=done, unit=unit, unit_scale=True, file=sys.stderr, disable=disable
    )
    try:
        yield Bar(bar)
    finally:
        with contextlib.suppress(OSError):
            bar.close()


def print_line(line: str) -> None:
    """Prints a line on standard output, above any bar."""
    with contextlib.suppress(OSError):
        tqdm.tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
