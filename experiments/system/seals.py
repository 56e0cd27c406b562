"""Seals: digests of the files of a folder that are read again.

seal.json lists name, size and SHA-256 of each sealed file, and has a digest of its own. While a
file is replaced, it lists both contents, so a process can be killed at any time.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.system import files
from experiments.system.command_line import ArgumentError

SEAL = "seal.json"
Entry = dict[str, Any]


class DamagedFileError(ArgumentError):
    """A file is not as it was written. The message names it, and the way out."""


def write_sealed(folder: Path, texts: Mapping[str, str], unsealed: Iterable[str] = ()) -> None:
    """Writes files, each whole or not at all, and seals them.

    Args:
        folder: an existing folder, in which no other process writes.
        texts: contents by name, in the order of writing.
        unsealed: names of files that will change without a seal, such as those that grow.
    """
    old = _read_seal(folder) or {}
    old = {name: known for name, known in old.items() if name not in set(unsealed)}
    new = {name: [_entry_of(text.encode())] for name, text in texts.items()}
    _write_seal(folder, old | {name: old.get(name, []) + new[name] for name in new})
    for name, text in texts.items():
        files.write_text(folder / name, text)
    _write_seal(folder, old | new)


def read_sealed(folder: Path, name: str) -> bytes:
    """Returns the content of a sealed file.

    Raises:
        DamagedFileError: if it cannot be read, is not sealed, or not as it was sealed.
    """
    try:
        content = files.read_bytes(folder / name)
    except OSError as error:
        raise DamagedFileError(f"{folder / name} cannot be read: {error.strerror}") from error
    sealed = _read_seal(folder)
    if sealed is None:
        raise _damaged(folder, f"{folder / name} has no seal: there is no {SEAL}")
    if name not in sealed:
        raise _damaged(folder, f"{folder / name} has no seal: {SEAL} does not name it")
    if _entry_of(content) not in sealed[name]:
        raise _damaged(folder, f"{folder / name} was changed after it was written")
    return content


def changed_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Returns which of the files are there and not as they were sealed."""
    try:
        sealed = _read_seal(folder) or {}
    except DamagedFileError:
        sealed = {}
    there = [name for name in names if (folder / name).is_file()]
    return [
        name
        for name in there
        if _entry_of(files.read_bytes(folder / name)) not in sealed.get(name, [])
    ]


def accept(folder: Path, names: Iterable[str]) -> None:
    """Seals the files that are there as they are."""
    there = [name for name in names if (folder / name).is_file()]
    _write_seal(folder, {n: [_entry_of(files.read_bytes(folder / n))] for n in there})


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _entry_of(content: bytes) -> Entry:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read_seal(folder: Path) -> dict[str, list[Entry]] | None:
    """Returns the accepted contents of each file; None if the folder has no seal."""
    if not (folder / SEAL).exists():
        return None
    try:
        known = json.loads(files.read_bytes(folder / SEAL))
        if known["sha256"] != digest(known["files"]):
            raise ValueError("it was changed after it was written")
        return known["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, f"{folder / SEAL} is damaged ({error})") from error


def _write_seal(folder: Path, entries: Mapping[str, list[Entry]]) -> None:
    content = {"files": dict(entries), "sha256": digest(dict(entries))}
    files.write_text(folder / SEAL, json.dumps(content, indent=1) + "\n")


def _damaged(folder: Path, what: str) -> DamagedFileError:
    return DamagedFileError(
        f"{what}. Restore it from a copy, or accept the folder as it is: python -m "
        f"experiments.seal {files.as_typed(folder)} --accept"
    )
