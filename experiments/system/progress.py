"""A progress bar, whose reader may go away: no reason to lose what is computed."""

import contextlib
import sys
from collections.abc import Iterator

import tqdm


class Bar:
    """On standard error; see :func:`shown`."""

    def __init__(self, bar: tqdm.tqdm) -> None:
        self._bar = bar

    def advance(self, count: int) -> None:
        """So many more are done."""
        with contextlib.suppress(OSError):
            self._bar.update(count)


@contextlib.contextmanager
def shown(total: int, unit: str, *, done: int = 0, silent: bool = False) -> Iterator[Bar]:
    """A bar of `total` units, of which some are done."""
    bar = tqdm.tqdm(total=total, initial=done, unit=unit, file=sys.stderr, disable=silent)
    try:
        yield Bar(bar)
    finally:
        with contextlib.suppress(OSError):
            bar.close()


def print_line(line: str) -> None:
    """A line on standard output, above any bar."""
    with contextlib.suppress(OSError):
        tqdm.tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
