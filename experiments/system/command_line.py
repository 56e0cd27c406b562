"""Command lines: options from dataclasses, and errors of one line."""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro

from experiments.system.suggestions import did_you_mean

T = TypeVar("T")
ConfigT = TypeVar("ConfigT")


def preset_value(default: str) -> str:
    """Returns what `--help` adds for an option whose help names its default."""
    return "" if default == "None" else f"(preset: {default})"


# An option, or None for the default that its help names.
OrDefault = Annotated[T | None, tyro.conf.arg(help_behavior_hint=preset_value)]


class ArgumentError(ValueError):
    """An argument that cannot be used. The message names the option as the user typed it."""


def parse(
    config_type: type[ConfigT],
    description: str,
    args: Sequence[str] | None,
    presets: Mapping[str, ConfigT] | None = None,
) -> ConfigT:
    """Parses command-line arguments into a configuration.

    Args:
        config_type: a dataclass.
        description: shown by `--help`.
        args: the arguments; None takes those of the process.
        presets: configurations by name, whose values replace the defaults after `--preset NAME`.

    Raises:
        SystemExit: with status 0 after `--help`; with status 2, and one line on standard error,
            if the arguments do not parse or the configuration raises a ValueError.
    """
    rest: Sequence[str] = sys.argv[1:] if args is None else args
    default = None
    if presets is not None:
        description += f"\n\n--preset NAME starts from a published recipe: {', '.join(presets)}."
        choices: Any = Literal[(None, *presets)]
        preset_type = dataclasses.make_dataclass("Preset", [("preset", choices, None)])
        chosen, rest = _cli(preset_type, rest, return_unknown_args=True, add_help=False)
        default = presets.get(chosen.preset)
    return _cli(config_type, rest, description=description, default=default)


def _cli(config_type: Any, args: Sequence[str], **options: Any) -> Any:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(config_type, args=args, config=(tyro.conf.DisallowNone,), **options)
    except SystemExit as exit_:
        if not exit_.code:
            raise
    message = _one_line(printed.getvalue())
    fail(message.rstrip(".") + "." + _meant(message, config_type))


def fail(message: str) -> NoReturn:
    """Ends the program with status 2 and one line on standard error."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _meant(message: str, config_type: Any) -> str:
    """Returns a suggestion for a mistyped option or choice, if a name is close."""
    if choice := re.search(r"invalid choice '(.+?)' .*Expected one of \((.*)\)", message):
        return did_you_mean(choice[1], re.findall(r"'(.+?)'", choice[2]))
    if option := re.search(r"Unrecognized options: (--[\w-]+)", message):
        names = (field.name for field in dataclasses.fields(config_type))
        return did_you_mean(option[1], (f"--{name.replace('_', '-')}" for name in names))
    return ""


def _one_line(box: str) -> str:
    """Returns the message in tyro's box, up to its first rule.

    Terminals without box characters get a rule under the title instead of a box.
    """
    drawn = box.lstrip().startswith("╭")
    lines = [line.strip("│ \n") for line in box.splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰"]
    rules = [i for i, line in enumerate(lines) if set(line) <= set("─-")] + [len(lines)]
    body = lines[: rules[0]] if drawn else lines[rules[0] + 1 : rules[min(1, len(rules) - 1)]]
    message = re.sub(r"\s+([.,])", r"\1", " ".join(body))
    return re.sub(r"^Error parsing [A-Z]\w*: ", "", message).split(" Got errors:")[0]
