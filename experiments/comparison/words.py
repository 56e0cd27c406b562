"""Tasks and origins of results, in words."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.comparison.grid import task_of
from experiments.comparison.significance import Estimate
from experiments.config.config import Config
from experiments.config.recipe import resolve


def task_in_words(task: dict[str, Any]) -> str:
    """Says what was learned."""
    return f"{setting_in_words(task)}, {labels_in_words(task)}"


def labels_in_words(task: dict[str, Any]) -> str:
    """Says how many labels are wrong."""
    noise = task["label_noise"]
    return f"{100 * noise:g} % wrong labels" if noise else "clean labels"


def setting_in_words(task: dict[str, Any]) -> str:
    """Says everything about a task except its labels and the data set's defaults."""
    asked = Config(dataset=task["dataset"], batch_size=task["batch_size"])
    usual = task_of(asked, resolve(asked))
    parts = [task["dataset"], task["model"], f"batch {task['batch_size']}"]
    if task["train_examples"]:
        parts.insert(1, f"{task['train_examples']:,} examples")
    shown = ("dataset", "model", "batch_size", "train_examples", "label_noise")
    for name in set(task) - set(shown):
        if task[name] != usual[name]:
            parts.append(f"{name.replace('_', ' ')} {task[name]}")
    return ", ".join([*parts[:3], *sorted(parts[3:])])


def table(rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table. The second row says how columns are aligned."""
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def shell(commands: Iterable[str]) -> str:
    """Returns commands as a block of Markdown, which they cannot end."""
    text = "\n".join(commands)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"


def points(difference: Estimate) -> str:
    """Returns a difference in points with half of its interval, marked if that excludes zero."""
    mark = "**" if difference.low > 0 else "*" if difference.high < 0 else ""
    half = f" ± {100 * (difference.high - difference.mean):.2f}" if difference.count > 1 else ""
    return f"{mark}{100 * difference.mean:+.2f}{half}{mark}"


def duration(seconds: float) -> str:
    """Returns a duration as text, in the largest unit that it fills."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2f} s"


def computed_with(about: dict[str, Any]) -> str:
    """Says which versions and hardware computed the results."""
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    hardware = ", ".join(f"{name}: {value}" for name, value in about["hardware"].items())
    return f"{versions}. {hardware}."
