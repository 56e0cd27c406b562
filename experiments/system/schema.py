"""Files that are read again, checked against types: every error names the file and the field."""

import contextlib
import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from experiments.system.command_line import ArgumentError

T = TypeVar("T")


class UnreadableFileError(ArgumentError):
    """A file does not hold what it should. The message names the file, the field and the fault."""


def json_as(type_: type[T], content: bytes, path: Path) -> T:
    """Returns the JSON value in a file as a `type_`.

    Args:
        type_: a dataclass without unknown fields, or another type that msgspec knows. Numbers are
            finite.
        content: the bytes of the file.
        path: named in messages.

    Raises:
        UnreadableFileError: if it is no JSON, or no such value.
    """
    with _errors_of(path):
        return converted_to(type_, msgspec.json.decode(content))


def converted_to(type_: type[T], value: Any) -> T:
    """Returns a JSON value as a `type_`. See :func:`json_as`.

    Raises:
        ValueError: if it is no such value.
    """
    if dataclasses.is_dataclass(type_):
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {_shown(value)}")
        known = {field.name for field in dataclasses.fields(type_)}
        if unknown := sorted(set(value) - known):
            raise ValueError(f"unknown field {unknown[0]!r}")
    _check_finite(value, "$")
    return msgspec.convert(value, type_, dec_hook=_from_text)


def csv_as(
    type_: type[T], content: bytes, path: Path, *, optional: bool = False, finite: bool = True
) -> list[T]:
    """Returns the rows below the header of a CSV file, each as a `type_`.

    Args:
        type_: a dataclass with a field per column. An empty cell is a field that is not given.
        content: the bytes of the file, in UTF-8.
        path: named in messages.
        optional: whether columns of fields with a default may be missing.
        finite: whether all numbers must be finite.

    Raises:
        UnreadableFileError: if it is no CSV, has other columns, or a row does not fit.
    """
    with _errors_of(path):
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        _check_columns(type_, list(reader.fieldnames or ()), optional)
        return [_row_as(type_, row, reader.line_num, finite) for row in reader]


def _row_as(type_: type[T], row: Mapping[Any, Any], line: int, finite: bool) -> T:
    try:
        if None in row or None in row.values():
            raise ValueError(f"expected {len(row) - (None in row)} cells")
        given = {name: cell for name, cell in row.items() if cell != ""}
        converted = msgspec.convert(given, type_, strict=False)
        if finite:
            _check_finite(vars(converted), "$")
        return converted
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from error


def _check_columns(type_: Any, columns: list[str], optional: bool) -> None:
    fields = {field.name: field for field in dataclasses.fields(type_)}
    if len(set(columns)) < len(columns):
        raise ValueError("a column is there twice")
    if unknown := [name for name in columns if name not in fields]:
        raise ValueError(f"unknown column {unknown[0]!r}")
    needed = [
        name
        for name, field in fields.items()
        if not (optional and field.default is not dataclasses.MISSING)
    ]
    if missing := [name for name in needed if name not in columns]:
        raise ValueError(f"the column {missing[0]!r} is missing")


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Makes every error of reading one that names the file."""
    try:
        yield
    except (ValueError, csv.Error, RecursionError) as error:
        first = " ".join(str(error).split())[:200]
        raise UnreadableFileError(f"{path} cannot be read: {first}") from error


def _check_finite(value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value} - at `{place}`")
    if isinstance(value, Mapping):
        for name, part in value.items():
            _check_finite(part, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for part in value:
            _check_finite(part, f"{place}[...]")


def _from_text(type_: Any, value: Any) -> Any:
    if type_ is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"expected {type_.__name__}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return repr(value)[:40]
