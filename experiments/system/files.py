"""Files that are written whole or not at all, and folders that are never overwritten."""

import contextlib
import csv
import datetime
import fcntl
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, replacing the file if it exists."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a header and `rows`. A row may lack columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Returns the rows below the header of `path`."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_new(path: Path) -> None:
    """Raises FileExistsError unless `path` does not exist or is an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already and is never overwritten")


def new_folder(name: str, parent: Path = Path("runs")) -> Path:
    """Returns a path in `parent` that does not exist yet, from name, date and time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path, copy = parent / f"{name}-{stamp}", 1
    while path.exists():
        copy += 1
        path = parent / f"{name}-{stamp}-{copy}"
    return path


def as_typed(path: Path) -> Path:
    """Returns the path as a user would type it: relative to the working directory if inside it."""
    path, here = path.resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock on an existing folder. The lock ends with this process at the latest.

    Raises:
        BlockingIOError: if another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{folder} is in use by another process") from error
        yield
    finally:
        os.close(descriptor)
