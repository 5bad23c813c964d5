"""The pages for the next people say what is so: rooms, stages, and every path, name and command that they name exist.

`python -m tests.contract.test_architecture` prints the table of stages for docs/background/architecture.md.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from uwm_deploy.cli import cli
from uwm_deploy.pipeline.plan import plan_of
from uwm_deploy.pipeline.request import Request
from uwm_deploy.stages.job import ONLY, Plan
from uwm_deploy.stages.table import STAGES, Stage

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "uwm_deploy"
ARCHITECTURE = ROOT / "docs" / "background" / "architecture.md"
LINES = {ARCHITECTURE: 250, ROOT / "CONTRIBUTING.md": 90, ROOT / "SECURITY.md": 110, ROOT / "README.md": 120}
PAGES = [page for page in LINES if page.name != "README.md"]
ENTRIES = 20

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# --- rooms ---------------------------------------------------------------------------------------------------------


def _section(title: str) -> str:
    found = re.search(
        rf"^## {title}\n(.*?)(?=^## |\Z)", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert found is not None, title
    return found[1]


def _rooms() -> list[str]:
    """First column of the table of rooms, in its order."""
    return re.findall(r"^\| `([^`]+?)/?` \| \S", _section("Rooms"), re.MULTILINE)


def test_every_entry_of_the_package_has_one_line() -> None:
    """`ls uwm_deploy` is the table, and has at most twenty entries."""
    found = sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")
    assert sorted(_rooms()) == found
    assert len(found) <= ENTRIES


def test_rooms_stand_as_the_contract_has_them() -> None:
    """Top floor first: what may import stands above what it may import; every room has a floor."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    floor = {name.strip(): number for number, layer in enumerate(layers) for name in layer.split("|")}
    floors = [
        floor[f"uwm_deploy.{room.removesuffix('.py')}"] for room in _rooms() if room not in ("__init__.py", "py.typed")
    ]
    assert floors == sorted(floors)
    assert len(floors) == len(floor)
    for contract in contracts:
        assert f"*{contract['name']}.*" in _section("Imports run downwards")


# --- stages --------------------------------------------------------------------------------------------------------


@cache
def _plans() -> tuple[Plan, ...]:
    """Of a build with a closed-form step and of one without, both in several precisions."""
    precisions = ("fp32", "fp16", "int8")
    return tuple(plan_of(Request(method=method, precisions=precisions)) for method in ("uwm", "safety-axis"))


def _folders(stage: Stage) -> str:
    """How many folders a stage leaves."""
    found = [tuple(stage.each(plan)) for plan in _plans()]
    several = next(variants for variants in found if variants)
    if several == (ONLY,):
        return "one" if all(found) else "one, or none without a closed-form step"
    if several[0].target is None:
        return "one per precision but fp32"
    return "one per target, precision and provider"


def stages_table() -> str:
    """The table of the stages in Markdown."""
    rows = ["| stage | what it does | reads | sources | folders |", "|---|---|---|---|---|"]
    rows += [
        f"| `{stage.name}` | {stage.does} | {', '.join(stage.reads) or '-'} | {', '.join(stage.sources) or '-'} "
        f"| {_folders(stage)} |"
        for stage in STAGES
    ]
    return "\n".join(rows)


def test_the_table_of_stages_is_the_list_of_stages() -> None:
    """The page has what `stages/table.py` says; this module prints it."""
    assert stages_table() in ARCHITECTURE.read_text(encoding="utf-8"), f"\n{stages_table()}"


# --- what the pages name -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", LINES, ids=lambda page: page.name)
def test_pages_are_short(page: Path) -> None:
    """Each has a limit that a reader has patience for."""
    assert len(page.read_text(encoding="utf-8").splitlines()) <= LINES[page]


@pages
def test_the_readme_links_the_page(page: Path) -> None:
    """Whoever comes to the project finds them."""
    assert f"]({page.relative_to(ROOT)})" in (ROOT / "README.md").read_text(encoding="utf-8")


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link is a file, and its anchor a heading there."""
    for link, anchor in re.findall(r"\]\(([^):#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, (link, anchor)


def _spans(text: str) -> list[str]:
    """What stands between backticks, code blocks apart."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^(?: {4}|```).*$", "", text, flags=re.MULTILINE))


_FOLDERS = ("calibration", "ci", "docs", "export", "tests", "uwm_deploy")
"""Folders of the repository; a checkout has others, such as `dist`, that are not in it."""


def _is_path(span: str) -> bool:
    """Whether it is meant as a path of this repository: it ends like a source file, or begins with a folder that is here."""
    path = span.partition(":")[0]
    if not re.fullmatch(r"[\w.*/-]+", path):
        return False
    first, slash, _ = path.partition("/")
    return path.endswith((".py", ".md", "pyproject.toml")) or bool(
        slash and (first in _FOLDERS or (PACKAGE / first).is_dir())
    )


def _files(path: str) -> list[Path]:
    return [file for base in (ROOT, PACKAGE) for file in base.glob(path)]


@cache
def _defined(file: Path) -> frozenset[str]:
    """Names that a module defines at its top."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


@pages
def test_paths_exist(page: Path) -> None:
    """Every path is a file or folder; a name behind its colon is defined there."""
    spans = [span for span in _spans(page.read_text(encoding="utf-8")) if _is_path(span)]
    assert spans
    for span in spans:
        path, _, name = span.partition(":")
        files = _files(path)
        assert files, span
        assert not name or any(name in _defined(file) for file in files if file.suffix == ".py"), span


@cache
def _names_in_the_package() -> frozenset[str]:
    return frozenset().union(*(_defined(file) for file in PACKAGE.rglob("*.py")))


@pages
def test_names_exist(page: Path) -> None:
    """Every name of the package with its dots, and every word in camel case, is there."""
    for span in _spans(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"uwm_deploy(\.\w+)+", span):
            assert _resolves(span), span
        elif re.fullmatch(r"(?:[A-Z][a-z]+)+", span):
            assert span in _names_in_the_package(), span


def _resolves(name: str) -> bool:
    """Whether it is a module, or an attribute of one."""
    try:
        return import_module(name).__name__ == name
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return hasattr(import_module(module), attribute)


def test_what_is_not_there_is_found() -> None:
    """The tests above would see it."""
    assert _is_path("stages/nothing.py")
    assert not _files("stages/nothing.py")
    assert "STAGES" in _defined(PACKAGE / "stages" / "table.py")
    assert "NOTHING" not in _defined(PACKAGE / "stages" / "table.py")
    assert _resolves("uwm_deploy.stages.table.STAGES")
    assert not _resolves("uwm_deploy.stages.table.NOTHING")
    assert list(_commands("`uwm-deploy nothing --option`")) == [["nothing", "--option"]]
    assert _spans("a `b` c\n\n    `d`\n") == ["b"]
    assert not _is_path("dist/demo")


# --- commands ------------------------------------------------------------------------------------------------------


def _commands(text: str) -> Iterator[list[str]]:
    """Words behind each `uwm-deploy`."""
    for rest in re.findall(r"\buwm-deploy ([a-z][^\n`#]*)", text):
        yield rest.split()


@pages
def test_commands_exist(page: Path) -> None:
    """Every `uwm-deploy X` is a command with the options that are given to it."""
    for words in _commands(page.read_text(encoding="utf-8")):
        command = _command(words)
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, words


def _command(words: list[str]) -> click.Command:
    """The command that words begin with, groups inside groups included."""
    found: click.Command = cli
    for word in words:
        inner = found.get_command(click.Context(found), word) if isinstance(found, click.Group) else None
        if inner is None:
            break
        found = inner
    assert found is not cli, words
    return found


@pages
def test_programs_exist(page: Path) -> None:
    """What is called in `.venv/bin` is installed by the extra [dev]; modules that Python runs are there."""
    text = page.read_text(encoding="utf-8")
    for program in set(re.findall(r"\.venv/bin/([\w-]+)", text)) - {"pip"}:  # what makes an environment brings it
        assert (Path(sys.executable).parent / program).exists(), program
    for module in re.findall(r"python -m ([\w.]+)", text):
        extra = f'docs = ["{module}-'  # the site's tool, which CI installs and who tests need not
        assert find_spec(module) is not None or extra in (ROOT / "pyproject.toml").read_text(), module
    for file in re.findall(r"^    .*?((?:tests|docs)/[\w/.-]+)", text, re.MULTILINE):
        assert (ROOT / file).exists(), file


if __name__ == "__main__":
    print(stages_table())
