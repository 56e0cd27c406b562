"""Command lines whose errors are one line."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import NoReturn, TypeVar

import tyro

ConfigT = TypeVar("ConfigT")


def parse(config_type: type[ConfigT], description: str, args: Sequence[str] | None) -> ConfigT:
    """A configuration from command line arguments.

    Raises:
        SystemExit: with status 0 after `--help`; with status 2, and one line on standard error,
            if the arguments do not parse or the configuration refuses them with a ValueError.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(config_type, description=description, args=args)
    except SystemExit as exit_:
        if not exit_.code:
            raise
    fail(_one_line(printed.getvalue()))


def fail(message: str) -> NoReturn:
    """Ends the program with status 2 and one line on standard error."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _one_line(box: str) -> str:
    """The message in tyro's box, up to its first rule."""
    lines = [line.strip("│ \n") for line in box.splitlines()]
    body = [line for line in lines if line and line[0] not in "╭╰"]
    rule = next((i for i, line in enumerate(body) if set(line) == {"─"}), len(body))
    message = re.sub(r"\s+([.,])", r"\1", " ".join(body[:rule]))
    return re.sub(r"^Error parsing [A-Z]\w*: ", "", message)
