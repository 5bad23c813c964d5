"""The sources that a function can reach by import, computed from the code and never kept by hand.

A stage is made again when one of them changes. Imports inside functions count, imports for the type checker do not, and a
string that is the whole name of a module counts as an import: it is imported or started by that name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from uwm_deploy.records.files import digest_of_file, digest_of_plain
from uwm_deploy.records.model import Digest

PACKAGE = "uwm_deploy"


@cache
def root() -> Path:
    """Folder of the package."""
    return Path(__file__).resolve().parents[1]


@cache
def digest_of_sources(module: str) -> Digest:
    """Digest of every source that a module can reach, itself included."""
    return digest_of_plain({path.relative_to(root()).as_posix(): _digest(path) for path in sources_of(module)})


def sources_of(module: str) -> list[Path]:
    """Files that a module can reach by import, itself and the packages around each included, in path order.

    What a package offers by itself is reached by those only that import it from the package.
    """
    waiting, found = [module], set[str]()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports_of(name)
    around = {package for name in found for package in _packages_around(name)}
    return sorted({path for name in found | around if (path := file_of(name)) is not None})


@cache
def file_of(module: str) -> Path | None:
    """File of a module of this package; None where there is none."""
    if module.partition(".")[0] != PACKAGE:
        return None
    base = root().joinpath(*module.split(".")[1:])
    files = (base / "__init__.py", base.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


@cache
def imports_of(module: str) -> tuple[str, ...]:
    """Modules of this package that a module imports anywhere, or names as a whole string."""
    path = file_of(module)
    if path is None:
        return ()
    named = _named(ast.parse(path.read_bytes()))
    return tuple(sorted({name for name in named if file_of(name) is not None} - {module}))


@cache
def _digest(path: Path) -> Digest:
    return digest_of_file(path)


def _packages_around(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _named(node: ast.AST) -> Iterator[str]:
    """Names that may be modules; imports for the type checker are left out."""
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        modules = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from modules
        if any(file_of(name) is None for name in modules):
            yield node.module
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str) and node.value.startswith(f"{PACKAGE}."):
            yield node.value
    else:
        inner = node.orelse if isinstance(node, ast.If) and _is_type_checking(node.test) else ast.iter_child_nodes(node)
        for part in inner:
            yield from _named(part)


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )
