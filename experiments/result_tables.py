"""Rewrites the marked tables in docs/, and the plot of wrong labels, from results/.

python -m experiments.result_tables
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from experiments.comparison.documents import updated
from experiments.system import command_line, exhaustion, files

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class ResultTablesOptions:
    """The command line. It has no options."""


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line.parse(ResultTablesOptions, __doc__ or "", args)
    for path, text in updated(ROOT).items():
        files.write_text(path, text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    exhaustion.run(main)
