"""The rooms of `experiments`: imports point down, and no two things share a name."""

import ast
import collections
import re
from pathlib import Path

import experiments

ROOT = Path(experiments.__file__).parent
# From top to bottom, as the docstring of the package lists them; "" are the commands.
ROOMS = [
    "",
    "benchmarks",
    "measures",
    "comparison",
    "run",
    "step",
    "config",
    "models",
    "data",
    "system",
]
SOURCES = {path.relative_to(ROOT): path.read_text() for path in ROOT.rglob("*.py")}


def room_of(path):
    return ROOMS.index(path.parts[0] if len(path.parts) > 1 else "")


def test_imports_point_down_and_nobody_imports_a_command():
    for path, text in SOURCES.items():
        for names in re.findall(r"from experiments(?:\.([\w.]+))? import (\w+)", text):
            parts = [part for name in names for part in name.split(".") if part]
            # A command is in no room.
            assert parts[0] in ROOMS, f"{path} imports {parts}"
            assert ROOMS.index(parts[0]) >= room_of(path), f"{path} imports {parts}"
            module = Path(*parts[:2]).with_suffix(".py")
            assert "def main(" not in SOURCES.get(module, ""), f"{path} imports {module}"


def test_every_room_says_what_lives_there_and_what_may_not():
    assert {path.parts[0] for path in SOURCES if len(path.parts) > 1} == set(ROOMS[1:])
    for room in ROOMS[1:]:
        text = ast.get_docstring(ast.parse(SOURCES[Path(room) / "__init__.py"]))
        assert text is not None
        assert len(re.findall(r"\.(?:\s|$)", text)) >= 2


def test_no_two_things_share_a_name():
    """Functions and classes for other modules; every command has its own `main`."""
    names = collections.Counter(
        node.name
        for text in SOURCES.values()
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    )
    del names["main"]
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_modules_are_short():
    assert {path: n for path, text in SOURCES.items() if (n := text.count("\n")) > 300} == {}
