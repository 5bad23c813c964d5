"""Every public function that takes or returns arrays says their shapes and dtypes in its docstring.

The style: a parameter says it in its entry under ``Args:`` (those of ``__init__`` stand in the class's docstring), a result
under ``Returns:`` or ``Yields:`` or in the text above the sections, a field of a record in its entry under ``Attributes:``.
A shape is parenthesised, ``(n, d)``, ``(n,)``, ``()`` for a scalar, or the words "any shape"; a dtype is one of `DTYPE`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import uwm_deploy

PACKAGE = Path(uwm_deploy.__file__).parent

ARRAYS = frozenset({"ndarray", "NDArray", "Tensor"})
"""Last names of the types that are arrays."""

_DIMENSION = r"(?:\.\.\.|\w+)(?: ?[-+*/] ?\w+)*"
SHAPE = re.compile(rf"\((?:{_DIMENSION},|{_DIMENSION}(?:, {_DIMENSION})+|)\)|\bany shape\b", re.IGNORECASE)
DTYPE = re.compile(
    r"\b(?:float(?:16|32|64)|bfloat16|float8_\w+|u?int(?:8|16|32|64)|bool|str|objects?|integers|dtype)\b",
    re.IGNORECASE,
)
"""A named type, "any dtype", "any floating dtype", "the same dtype", "dtype of the rows" and the like."""

_SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes|Example|Note):\s*$")
_ENTRY = re.compile(r"^ {4}(\*{0,2}\w+):")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sections_of(docstring: str) -> dict[str, str]:
    """Text of each section of a Google docstring by its title; the text above the first one has the title ""."""
    title, found = "", {"": ""}
    for line in docstring.splitlines():
        if match := _SECTION.match(line):
            title = match[1]
        else:
            found[title] = found.get(title, "") + line + "\n"
    return found


def entries_of(section: str) -> dict[str, str]:
    """Text of each entry of an ``Args`` or ``Attributes`` section by its name."""
    name, found = "", dict[str, str]()
    for line in section.splitlines():
        if match := _ENTRY.match(line):
            name = match[1]
        found[name] = found.get(name, "") + line + "\n"
    return found


def lacks(text: str) -> str:
    """What a description of an array does not say."""
    return " and no ".join(what for what, pattern in (("shape", SHAPE), ("dtype", DTYPE)) if not pattern.search(text))


def names_arrays(annotation: ast.expr | None, arrays: frozenset[str]) -> bool:
    """Whether an annotation names an array type, inside a container too."""
    if annotation is None:
        return False
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return names_arrays(ast.parse(annotation.value, mode="eval").body, arrays)
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    return bool((names | {node.attr for node in ast.walk(annotation) if isinstance(node, ast.Attribute)}) & arrays)


def array_types(trees: Mapping[str, ast.Module]) -> dict[str, frozenset[str]]:
    """Names that stand for arrays in each module: the types, aliases and subclasses of them, and imports of these."""
    found = dict.fromkeys(trees, ARRAYS)
    before: dict[str, frozenset[str]] = {}
    while found != before:
        before = found
        found = {
            module: before[module] | frozenset(_made_of_arrays(tree, before, module)) for module, tree in trees.items()
        }
    return found


def _made_of_arrays(tree: ast.Module, known: Mapping[str, frozenset[str]], module: str) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
            alias = node.targets[0]
            if isinstance(alias, ast.Name) and alias.id[0].isupper() and names_arrays(node.value, known[module]):
                yield alias.id
        elif isinstance(node, ast.ClassDef) and any(names_arrays(base, known[module]) for base in node.bases):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield from (
                n.asname or n.name for n in node.names if n.name in known.get(node.module or "", frozenset()) - ARRAYS
            )


def _lacking_in_function(node: Function, name: str, docstring: str, arrays: frozenset[str]) -> Iterator[str]:
    sections = sections_of(docstring)
    entries = entries_of(sections.get("Args", ""))
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    for argument in filter(None, every):
        if names_arrays(argument.annotation, arrays) and (missing := lacks(entries.get(argument.arg, ""))):
            yield f"{name}: its argument {argument.arg} has no {missing}"
    if names_arrays(node.returns, arrays):
        text = sections.get("Returns", "") + sections.get("Yields", "") or sections[""]
        if missing := lacks(text):
            yield f"{name}: its result has no {missing}"


def _lacking_in_class(node: ast.ClassDef, arrays: frozenset[str]) -> Iterator[str]:
    docstring = ast.get_docstring(node) or ""
    fields = entries_of(sections_of(docstring).get("Attributes", ""))
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.target.id[0] != "_":
            if names_arrays(part.annotation, arrays) and (missing := lacks(fields.get(part.target.id, ""))):
                yield f"{node.name}: its field {part.target.id} has no {missing}"
        elif isinstance(part, Function) and (
            part.name[0] != "_" or part.name in ("__init__", "__call__", "__getitem__")
        ):
            own = docstring if part.name == "__init__" else ast.get_docstring(part) or ""
            yield from _lacking_in_function(part, f"{node.name}.{part.name}", own, arrays)


def findings(trees: Mapping[str, ast.Module]) -> list[str]:
    """What public functions and records of some modules, by dotted name, do not say of their arrays."""
    types, found = array_types(trees), []
    for module, tree in trees.items():
        for node in tree.body:
            if isinstance(node, Function) and node.name[0] != "_":
                lacking = _lacking_in_function(node, node.name, ast.get_docstring(node) or "", types[module])
            elif isinstance(node, ast.ClassDef) and node.name[0] != "_":
                lacking = _lacking_in_class(node, types[module])
            else:
                continue
            found += [f"{module}.{line}" for line in lacking]
    return found


def test_public_functions_say_the_shapes_and_dtypes_of_their_arrays() -> None:
    """No public function or record of the package leaves the shape or the dtype of an array to the reader."""
    trees = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        trees[".".join(parts)] = ast.parse(file.read_text(encoding="utf-8"))
    found = findings(trees)
    assert not found, f"{len(found)} arrays without a shape or a dtype in a docstring:\n" + "\n".join(found)


GOOD = '''
def f(rows: np.ndarray, names: list[str], parts: Mapping[str, Tensor | None]) -> np.ndarray:
    """Sums (n,) float64 of rows.

    Args:
        rows: (n, d) float32.
        names: Of the rows.
        parts: By name,
            (2b, ...) of any dtype.
    """
'''


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", None),
        ("(n, d) float32.", "float32.", "m.f: its argument rows has no shape"),
        ("(n, d) float32.", "(n, d).", "m.f: its argument rows has no dtype"),
        ("(n, d) float32.", "see (section 2).", "m.f: its argument rows has no shape and no dtype"),
        ("        rows: (n, d) float32.\n", "", "m.f: its argument rows has no shape and no dtype"),
        ("(2b, ...) of any dtype", "by name", "m.f: its argument parts has no shape and no dtype"),
        ("(n,) float64 ", "", "m.f: its result has no shape and no dtype"),
        ("(n,) float64 ", "() float64 ", None),
        ("def f", "def _f", None),
        ("(n, d) float32.", "float32, any shape: it is hashed.", None),
    ],
)
def test_a_missing_shape_or_dtype_is_found(old: str, new: str, message: str | None) -> None:
    """Each array of a signature is looked up in its own entry of the docstring, also one inside a container."""
    assert findings({"m": ast.parse(GOOD.replace(old, new))}) == ([message] if message else [])


def test_aliases_and_records_are_arrays_too() -> None:
    """An alias of an array type counts where it is defined and where it is imported, a record in its fields."""
    one = (
        "Batch = tuple[np.ndarray, int]\n"
        "class Part:\n"
        '    """A part.\n\n    Attributes:\n        rows: %s.\n    """\n'
        "    rows: Batch\n"
    )
    two = 'from one import Batch\ndef f(batch: Batch) -> None:\n    """Takes one."""\n'
    other = 'class Batch:\n    """A batch."""\ndef f(batch: Batch) -> None:\n    """Takes one."""\n'
    trees = {"one": ast.parse(one % "See above"), "two": ast.parse(two), "other": ast.parse(other)}
    assert findings(trees) == [
        "one.Part: its field rows has no shape and no dtype",
        "two.f: its argument batch has no shape and no dtype",
    ]
    assert findings({"one": ast.parse(one % "(n, d) float32 rows, and their number")}) == []
