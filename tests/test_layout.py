"""Rules of the library: public names, documentation, and the length of modules and functions."""

import ast
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest

import bisam_jax

SOURCES = sorted(Path(bisam_jax.__file__).parent.glob("*.py"))
MODULES = [
    importlib.import_module(f"bisam_jax.{module.name}")
    for module in pkgutil.iter_modules(bisam_jax.__path__)
]
FUNCTIONS = [name for name in bisam_jax.__all__ if inspect.isfunction(getattr(bisam_jax, name))]
TUPLES = [name for name in bisam_jax.__all__ if inspect.isclass(getattr(bisam_jax, name))]
STATES = [name for name in bisam_jax.__all__ if name.endswith("State")]

each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@each_function
def test_no_function_shares_its_name_with_a_module(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"bisam_jax.{name}")


def test_all_is_sorted_and_complete():
    assert bisam_jax.__all__ == sorted(set(bisam_jax.__all__))
    assert sorted(FUNCTIONS + TUPLES) == bisam_jax.__all__
    visible = {
        name
        for name, member in vars(bisam_jax).items()
        if not (name.startswith("_") or inspect.ismodule(member))
    }
    assert visible == set(bisam_jax.__all__)


def test_what_is_for_users_is_re_exported():
    """Users need every state, and every function whose docstring shows how to call it."""
    for module in MODULES:
        for name, member in vars(module).items():
            if getattr(member, "__module__", None) != module.__name__ or name.startswith("_"):
                continue
            is_state = inspect.isclass(member) and name.endswith("State")
            is_shown = inspect.isfunction(member) and "Examples:" in (member.__doc__ or "")
            if is_state or is_shown:
                assert getattr(bisam_jax, name, None) is member, f"{module.__name__}.{name}"


@each_function
def test_docstrings(name):
    text = inspect.getdoc(getattr(bisam_jax, name)) or ""
    lines = text.splitlines()
    sections = [line for line in lines if line in ("Args:", "Returns:", "Examples:")]
    assert sections == ["Args:", "Returns:", "Examples:"]
    assert ">>> " in text.partition("\nExamples:\n")[2]
    assert lines[0].endswith(".")
    assert lines[1] == ""


@pytest.mark.parametrize("name", STATES)
def test_docstrings_of_states(name):
    state = getattr(bisam_jax, name)
    fields = inspect.getdoc(state).partition("Attributes:")[2]
    assert all(f"{field}: " in fields for field in state._fields)


def test_state_fields_are_unique():
    """`optax.tree.get` raises if two fields have the same name."""
    fields = [field for name in STATES for field in getattr(bisam_jax, name)._fields]
    assert len(fields) == len(set(fields))


@each_source
def test_modules_are_short(source):
    text = source.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 300


def outermost_functions(tree):
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from outermost_functions(node)


def lines_of_code(function, text):
    """Counts the lines in a function, without docstrings, comments and blanks."""
    numbers = set(range(function.body[0].lineno, function.end_lineno + 1))
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            numbers -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [text.splitlines()[number - 1].strip() for number in numbers]
    return sum(bool(line) and not line.startswith("#") for line in lines)


@each_source
def test_functions_are_short(source):
    text = source.read_text()
    lengths = {f.name: lines_of_code(f, text) for f in outermost_functions(ast.parse(text))}
    assert {name: length for name, length in lengths.items() if length > 40} == {}


class Imports(ast.NodeVisitor):
    """Collects the packages that a module imports when it is run."""

    def __init__(self):
        self.packages = set()

    def visit_Import(self, node):
        self.packages |= {alias.name.partition(".")[0] for alias in node.names}

    def visit_ImportFrom(self, node):
        assert node.level == 0
        self.packages.add(node.module.partition(".")[0])

    def visit_If(self, node):
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)


@each_source
def test_imports(source):
    imports = Imports()
    imports.visit(ast.parse(source.read_text()))
    allowed = {"bisam_jax", "jax", "numpy", "optax"} | sys.stdlib_module_names
    if source.stem == "_lanczos":
        allowed |= {"matfree"}  # the extra [hessian], asked for where it is missing
    assert imports.packages <= allowed
