"""README and docs say what is so: their commands run, their links lead somewhere, the wheel holds what it should."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from uwm_deploy.cli import COMMANDS, cli
from uwm_deploy.commands.triton import DefaultGroup

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_readme_is_short_and_has_two_commands() -> None:
    """Under 120 lines; one command builds, one tests, each under its heading."""
    assert len(README.splitlines()) < 120
    build = re.search(r"## Build\n.*?\n    (.+?)\n", README, re.DOTALL)
    tests = re.search(r"## Test\n.*?\n    (.+?)\n", README, re.DOTALL)
    assert build is not None
    assert "uwm-deploy build --model demo" in build[1]
    assert tests is not None
    assert "pytest" in tests[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page is a file."""
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_link_is_called_by_what_it_leads_to(page: Path) -> None:
    """Never by the name of a file, which a reader of the site does not see."""
    assert re.findall(r"\[[\w./-]+\.md\]\([^)]*\)", page.read_text()) == []


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: p.name)
def test_every_page_is_on_the_site(page: Path) -> None:
    """It is in the site's list and on the first page, and links nothing that is not in docs/."""
    docs = ROOT / "docs"
    name = page.relative_to(docs).as_posix()
    assert re.search(rf"^ +- (?:[\w-]+: )?{re.escape(name)}$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert name == "index.md" or f"]({name})" in (docs / "index.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in link or (page.parent / link).resolve().is_relative_to(docs), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_docs_exist(page: Path) -> None:
    """Every `uwm-deploy X` in README and docs is a command, and its options are known."""
    for command, rest in re.findall(r"uwm-deploy ([a-z][a-z-]*)([^\n`#]*)", page.read_text()):
        assert command in COMMANDS, command
        words = [command]
        if isinstance(group := cli.get_command(click.Context(cli), command), click.Group) and (
            name := rest.split(" ")[1:2]
        ):
            if isinstance(group, DefaultGroup) and name[0] not in group.commands:
                name = [next(iter(group.commands))]
            assert name[0] in group.commands, (command, name)
            words += name
        text = CliRunner().invoke(cli, [*words, "--help"]).output
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in text, (command, option)


def _pictures() -> ModuleType:
    """The script that draws them."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(pictures := importlib.util.module_from_spec(spec))
    return pictures


def test_pictures_are_as_young_as_what_draws_them() -> None:
    """Every picture was drawn by the code of today, and nobody has changed it since; docs/pictures.py draws them anew."""
    pictures = _pictures()
    made = json.loads(pictures.MADE.read_text())
    assert set(made) == set(pictures.DRAWS) == {path.name for path in pictures.IMAGES.glob("*.png")}
    old = [name for name in made if made[name] != pictures.digests_of(name)]
    assert not old, "draw them anew: see docs/pictures.py"


def test_what_draws_a_picture_is_found_by_its_imports() -> None:
    """Parts of a page and its style sheets count, what computes its numbers does not."""
    pictures = _pictures()
    names = {name: {path.name for path in pictures.sources_of_picture(name)} for name in pictures.DRAWS}
    assert {"html.py", "blocks.py", "sections.py", "latency.py", "charts.py", "page.css"} <= names["demo-report.png"]
    assert "search.css" not in names["demo-report.png"]
    assert {"search_page.py", "markup.py", "page.css", "search.css"} <= names["look.png"]
    assert {"drawings.py", "sweep_points.py"} <= names["demo-sweep.png"]
    assert names["pipeline.png"] == {"pictures.py"}
    assert "metrics.py" not in set().union(*names.values())


def _wheel(tmp_path: Path) -> Path:
    """A wheel of the tracked files; building writes into the source tree, so they are copied first."""
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    return next(tmp_path.glob("*.whl"))


def test_the_wheel_holds_package_recipes_and_demo(tmp_path: Path) -> None:
    """The wheel has all modules, the TOML files under _shipped, the demo model, and nothing else at its top."""
    names = set(zipfile.ZipFile(_wheel(tmp_path)).namelist())
    assert {name.split("/")[0] for name in names} == {"uwm_deploy", "uwm_deploy-0.1.0.dist-info"}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "uwm_deploy").rglob("*.py")}
    assert modules <= names
    for kind in ("export", "calibration", "ci"):
        shipped = {f"uwm_deploy/_shipped/{kind}/{p.name}" for p in (ROOT / kind).glob("*.toml")}
        assert shipped
        assert shipped <= names
    assert {"uwm_deploy/py.typed", "uwm_deploy/data/demo/model/model.safetensors"} <= names
    assert not any("tests" in name for name in names)


@pytest.mark.slow
def test_a_wheel_installs_and_runs(tmp_path: Path) -> None:
    """Slow: the same wheel, in an environment of its own that sees the packages of this one, away from the source."""
    wheel = _wheel(tmp_path)
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    install = ["install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, cwd=tmp_path)
    (folder,) = home.glob("lib/python*/site-packages")
    (folder / "packages.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))

    def said(*words: str) -> str:
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    tool = str(home / "bin" / "uwm-deploy")
    assert said(tool, "--version").startswith("uwm-deploy, version ")
    assert "clip-vit-l14" in said(tool, "models", "--json")
    assert "mine/mine.toml" in said(tool, "init", "mine")
    code = "import uwm_deploy.report.search_page as page; print(page.__file__); assert page.style_text()"
    assert said(str(python), "-c", code).startswith(str(home))


def test_every_promise_of_security_names_a_test() -> None:
    """That the tests are there is checked with all other paths of the page."""
    table = (ROOT / "SECURITY.md").read_text().split("## Promised against whom", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    assert all(":test_" in row[3] or row[2].strip().startswith("**not**") for row in rows)
