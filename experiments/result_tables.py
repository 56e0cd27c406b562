"""Rewrites the marked tables of README.md and docs/comparing.md from results/.

python -m experiments.result_tables
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from experiments.comparison.documents import updated
from experiments.system import command_line, files

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class ResultTablesOptions:
    """The command line. It has no options."""


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line.parse(ResultTablesOptions, __doc__ or "", args)
    for path, text in updated(ROOT).items():
        files.write_text(path, text)
        print(f"wrote the tables of {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
