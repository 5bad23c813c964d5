"""The house keeps its measures: no module, class or function is too long, and no imports run in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "uwm_deploy"
MODULE_LINES, CLASS_LINES, FUNCTION_LINES = 500, 300, 60

_NOT_YET: set[str] = set()
"""What is still too long. The test wants it exact, so that the list only shrinks."""


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _too_long() -> Iterator[tuple[str, int]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MODULE_LINES:
            yield name, lines
        yield from _in_scope(_tree(path), name)


def _in_scope(scope: ast.AST, name: str) -> Iterator[tuple[str, int]]:
    """Classes and functions at any depth."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _in_scope(node, name)
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        inside = f"{name}:{node.name}" if ":" not in name else f"{name}.{node.name}"
        if lines > (CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES):
            yield inside, lines
        yield from _in_scope(node, inside)


def test_no_module_class_or_function_is_too_long() -> None:
    """500 lines a module, 300 a class, 60 a function; what is mended is taken off the list, and nothing is put on it."""
    found = {name for name, _ in _too_long()}
    assert found <= _NOT_YET, {name: lines for name, lines in _too_long() if name not in _NOT_YET}
    assert found >= _NOT_YET, f"take off the list: {sorted(_NOT_YET - found)}"


# --- circles ------------------------------------------------------------------------------------------------------------


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the package that a module names, wherever: at the top, for type checkers, or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` is of the module; a name in `package/__init__.py` is of the package.
            found |= (below & modules) | ({node.module} if below - modules else set())
    return found


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, by Tarjan's algorithm."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        numbers[name] = lowest[name] = len(numbers)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in numbers:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], numbers[other])
        if lowest[name] == numbers[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1 or name in graph[name]:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in numbers:
            visit(name)
    return found


def _graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    paths = {_module(path): path for path in package.rglob("*.py")}
    return {name: _imported(_tree(path), set(paths)) - {name} for name, path in paths.items()}


def test_no_imports_run_in_a_circle() -> None:
    """Not even for type checkers or inside functions: whoever reads a module finds what it stands on below it."""
    assert _circles(_graph()) == []


@pytest.mark.parametrize(
    "second",
    [
        "from uwm_deploy.first import A",
        "if TYPE_CHECKING:\n    from uwm_deploy.first import A",
        "def late():\n    from uwm_deploy import first",
        "import uwm_deploy.first",
    ],
)
def test_every_kind_of_circle_is_found(second: str) -> None:
    """The test above would see one."""
    modules = {"uwm_deploy", "uwm_deploy.first", "uwm_deploy.second", "uwm_deploy.third"}
    sources = {"first": "from uwm_deploy.second import B", "second": second, "third": "from uwm_deploy import first"}
    graph = {name: set() for name in modules} | {
        f"uwm_deploy.{name}": _imported(ast.parse(text), modules) for name, text in sources.items()
    }
    assert _circles(graph) == [["uwm_deploy.first", "uwm_deploy.second"]]
