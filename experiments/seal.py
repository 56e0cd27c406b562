"""Checks the seals of run folders and of comparisons, or seals them as they are.

    python -m experiments.seal runs/RUN

says which files were changed after they were written: these are refused wherever they are read.
Files that were changed by hand, and folders of older versions, which have no seal, are sealed by

    python -m experiments.seal runs/RUN --accept
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from experiments.comparison.reading import sealed_files
from experiments.system import command_line, exhaustion, files, seals


@dataclasses.dataclass(frozen=True)
class SealOptions:
    """The command line: which folders to check."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders and folders of comparisons."""
    accept: bool = False
    """Seal the files as they are."""


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    options = command_line.parse(SealOptions, __doc__ or "", args)
    damaged = False
    for folder in options.folders:
        if not folder.is_dir():
            command_line.fail(f"there is no folder {folder}")
        names = sealed_files(folder)
        changed = seals.changed_files(folder, names)
        if options.accept:
            try:
                with files.locked(folder):
                    seals.accept(folder, names)
            except OSError as error:
                command_line.fail(str(error))
        damaged |= bool(changed) and not options.accept
        state = "accepted" if options.accept else "changed"
        print(f"{folder}: {f'{state}: ' + ', '.join(changed) if changed else 'as written'}")
    if damaged:
        raise SystemExit(1)


if __name__ == "__main__":
    exhaustion.run(main)
