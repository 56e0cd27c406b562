"""Files that are written whole or not at all, and folders that are never overwritten."""

import contextlib
import csv
import datetime
import fcntl
import io
import itertools
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_TEMPORARY = ".tmp"


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, replacing the file if it exists. Then it is on disk.

    A link in its place is replaced, too, not followed.
    """
    # Another process may write the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(temporary, flags, 0o666), "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    with _opened(path.parent) as folder:
        os.fsync(folder)


def append_text(path: Path, text: str) -> None:
    """Appends to a file, which must be no link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
    with open(descriptor, "a", encoding="utf-8", newline="") as file:
        file.write(text)


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file, which must be no link.

    Raises:
        OSError: if it cannot be read, or is a link.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a header and `rows`. A row may lack columns."""
    write_text(path, csv_of(columns, rows))


def csv_of(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], header: bool = True) -> str:
    """Returns `rows` as text. A row may lack columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def check_new(path: Path) -> None:
    """Raises FileExistsError unless `path` does not exist or is an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already and is never overwritten")


def new_folder(name: str, parent: Path = Path("runs")) -> Path:
    """Makes a folder in `parent`, named by name, date and time, and returns its path."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for copy in itertools.count(1):
        path = parent / (f"{name}-{stamp}" if copy == 1 else f"{name}-{stamp}-{copy}")
        # Another process may make one within the same second.
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError


@contextlib.contextmanager
def given_or_new(given: Path | None, name: str) -> Iterator[Path]:
    """Yields the given path, or a new folder, which is removed if nothing was written to it."""
    folder = given or new_folder(name)
    try:
        yield folder
    finally:
        if given is None:
            for empty in (folder, folder.parent):
                with contextlib.suppress(OSError):
                    empty.rmdir()


def check_no_links(folder: Path) -> None:
    """Raises OSError if there is a link in the folder: it might lead to files elsewhere."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise OSError(f"{path} is a symbolic link: put what it names in its place")


def as_typed(path: Path) -> Path:
    """Returns the path as a user would type it: relative to the working directory if inside it."""
    path, here = path.resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock on an existing folder. The lock ends with this process at the latest.

    Raises:
        BlockingIOError: if another process holds it.
        OSError: if there is a link in the folder.
    """
    with _opened(folder) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{folder} is in use by another process") from error
        check_no_links(folder)
        for remains in folder.glob(f".*{_TEMPORARY}"):  # of a killed process
            remains.unlink()
        yield


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
