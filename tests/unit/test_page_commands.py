"""Every command of README and docs: a test runs it from the page, or `ELSEWHERE` or the page says why it is not run here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file

from tests.data_sets import members, png, put, write_shard
from tests.pages import PAGES, ROOT, Command, commands
from tests.serve.server import needs_triton_client
from tests.small_build import write_sets
from uwm_deploy.cli import cli
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.safeground.embedded import EmbeddedSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """Commands of a page that are not run from it in this file.

    Attributes:
        page: Pattern of the page.
        text: Pattern of the commands.
        how: "as it stands": a test of its own reads the command from the page. "the same steps": a test or the CI script
            takes them in other words. "not run": it is only checked that what the command names is there.
        where: Files, each with what must stand in it, which is what the reason rests on; with `::` a test in that file.
    """

    page: str
    text: str
    how: Literal["as it stands", "the same steps", "not run"]
    where: Mapping[str, str]


ELSEWHERE = (
    Elsewhere(
        page=r"README\.md|docs/tutorial\.md",
        text=r"python3 -m venv .*",
        how="the same steps",
        # The environment in a fresh checkout, and the demo's build without the target that needs a GPU.
        where={".ci/run": "python3 -m venv .venv", "tests/unit/test_default_build.py": 'until="package"'},
    ),
    Elsewhere(
        page=r"README\.md",
        text=r"\.venv/bin/python -m pytest -q",
        how="as it stands",
        where={".ci/run": "/^## Test/"},
    ),
    Elsewhere(
        page=r"docs/.*",
        text=r"pip install '\.\[.*\]'",
        how="not run",
        where={"tests/unit/test_page_commands.py::test_extras_that_pages_install_exist": "<= set(extras)"},
    ),
    Elsewhere(
        page=r"docs/tutorial\.md",
        text=r"(?s).*my-project.*",
        how="as it stands",
        where={"tests/unit/test_tutorial.py::test_your_own_data_end_with_a_bundle_that_opens": "tutorial.md"},
    ),
    Elsewhere(
        page=r"docs/how-to/fault-walkthrough\.md",
        text=r"(?:uwm-deploy|python|rm) .*",
        how="as it stands",
        where={"tests/unit/test_walkthrough.py": "fault-walkthrough.md"},
    ),
    Elsewhere(
        page=r"docs/how-to/embedding\.md",
        text=r"(?s)import sys.*",
        how="as it stands",
        where={"tests/unit/test_embed.py::test_ray_gives_the_rows_of_one_process": "embedding.md"},
    ),
    Elsewhere(
        page=r"docs/reference/cli\.md",
        text=r".*_UWM_DEPLOY_COMPLETE=(?:zsh|fish)_source.*",
        how="the same steps",
        # What these shells would read is printed; they are not installed.
        where={"tests/contract/test_cli.py::test_the_completion_of_a_shell_is_printed_and_documented": "_source"},
    ),
    Elsewhere(
        page=r"docs/reference/faults\.md",
        text=r"uwm-deploy selftest",
        how="the same steps",
        # One fault by the command, and one of every kind without it: all of them take hours.
        where={
            "tests/faults/test_zoo.py::test_the_command_says_how_many": '["selftest", "--fault"',
            "tests/faults/test_zoo.py::test_a_planted_fault_is_named": "plant_all(worlds, [fault]",
        },
    ),
    Elsewhere(
        page=r"docs/reliability\.md",
        text=r"pytest -m slow .* tests/faults",
        how="the same steps",
        # With all other slow tests, on the days when these are asked for.
        where={".ci/run": "$command -m slow"},
    ),
    Elsewhere(
        page=r"docs/how-to/triton\.md",
        text=r"python3\.11 -m venv server|server/bin/pip .*|site=.*|cp \$home.*|chmod .*|uwm-deploy triton backends .*"
        r"|uwm-deploy triton dist/demo models --place cpu|PATH=.*",
        how="the same steps",
        where={
            "tests/serve/server.py": "nvidia-pytriton==0.7.0",
            "tests/serve/server.py::_make": "python_backend_stubs",
            "tests/serve/server.py::started": "write_backends(backends)",
            "tests/serve/conftest.py": "started(",
        },
    ),
    Elsewhere(
        page=r"docs/how-to/own-data\.md",
        text=r"uwm-deploy (?!.*my-test).*",
        how="as it stands",
        where={
            "tests/unit/test_data_gather.py": "own-data.md",
            "tests/unit/test_data_gather.py::test_the_commands_of_the_page_run": 'r"^    uwm-deploy (.*)$", PAGE',
        },
    ),
)

DEAR = re.compile(
    r"uwm-deploy (?:build|edit|score|sweep|evaluate|compare|refit|compile|train|reproduce|diagnose|bench|look|save)\b"
    r"|g\+\+|ln |\./embed|.*--sweep|model_signing"
)
DEAR_PAGES = ("docs/how-to/safety-head.md", "docs/how-to/migrate.md")

LOOSE = """format = 1
name = "loose"
required = ["onnx"]
min_proven = 1
edit = []
[[artifact]]
metric = "parity.cosine_min"
at_least = 0.5
"""
"""A policy that every honest build of a small set keeps, for the commands that name none."""

MAY_FAIL = {"build", "gate", "refit"}
"""Whose verdict is about a small set here, so that exit codes 3 and 4 are answers too."""

BEFORE = {
    "docs/how-to/refit.md": ["uwm-deploy build --model demo"],
    "docs/reference/report.md": [
        "uwm-deploy build --model demo --precision fp32 --precision int8 --target onnxruntime",
        "uwm-deploy sweep --model demo --method uwm --keep-mass 0.9,0.98",
    ],
}
"""What a reader of a page has done before it."""

CALIBRATION = {
    "docs/how-to/safety-head.md": "limit = 640",
    "docs/reference/cli.md": 'limit = 160\nzero_shot = ["colour"]\nzero_shot_limit = 210',
}
"""What the small calibration set is, where 160 quadruples are too few or zero-shot sets are needed.

Training holds out 16 quadruples or more; a threshold that 1% of safe images reach takes 99 of them.
"""

REFUSED = {("docs/reference/data.md", "uwm-deploy data make pictures --out pairs.jsonl"): 2}
"""Where the page shows a refusal."""


def _is_elsewhere(command: Command) -> bool:
    return any(
        re.fullmatch(one.page, command.page) and re.fullmatch(one.text, command.words.strip()) for one in ELSEWHERE
    )


def _is_dear(command: Command) -> bool:
    return command.page in DEAR_PAGES or (not command.python and DEAR.match(command.words) is not None)


RUN = [one for page in PAGES for one in commands(page) if not one.is_marked and not _is_elsewhere(one)]
CHEAP = sorted({one.page for one in RUN if not _is_dear(one)})
WITH_DEAR = sorted({one.page for one in RUN if _is_dear(one)})


def test_every_command_is_found() -> None:
    """Also one in a fence, behind a prompt, and on two lines; nothing that looks like one is left out."""
    found = {(one.page, one.words) for page in PAGES for one in commands(page)}
    assert ("README.md", "uwm-deploy init my-project") in found
    assert ("docs/reference/data.md", "uwm-deploy data check pairs.jsonl --against demo-test") in found
    assert any(words.startswith("tritonserver") and "admin" in words for _, words in found)
    for page in PAGES:
        every = "\n".join(one.text for one in commands(page))
        for line in page.read_text().split("\n"):
            if re.match(r"(?: {4}|\$ )(?:\S+/)?[a-z+-]+ (?:[^|]* )?--[a-z]", line):
                assert line.strip("$ \\") in every, (page.name, line)


@pytest.mark.parametrize("one", ELSEWHERE, ids=lambda one: f"{one.page} {one.text}")
def test_what_is_not_run_here_is_where_it_says(one: Elsewhere) -> None:
    """Each place holds what its reason rests on; no pattern is left over, and none takes what another has."""
    for place, words in one.where.items():
        file, _, name = place.partition("::")
        text = (ROOT / file).read_text()
        if name:
            found = re.search(rf"^def {name}\(.*?(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
            assert found is not None, place
            text = text[found.start() :].partition("\n\n\n")[0]
        assert words in text, place
    every = [command for path in PAGES for command in commands(path) if re.fullmatch(one.page, command.page)]
    mine = [command.words.strip() for command in every if re.fullmatch(one.text, command.words.strip())]
    assert mine
    others = [other for other in ELSEWHERE if other is not one and re.fullmatch(other.page, every[0].page)]
    assert not [text for text in mine for other in others if re.fullmatch(other.text, text)]


def test_extras_that_pages_install_exist() -> None:
    """And no page installs the project from a package index, on which it is not."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"pip install (?:-\S+ )*'\.\[(.+?)\]'", text := page.read_text()):
            assert set(names.split(",")) <= set(extras), page
        assert not re.search(r"pip install[^\n`]* '?uwm-deploy\b", text), page


@pytest.mark.parametrize("page", CHEAP)
def test_what_is_cheap_runs_as_it_stands(page: str, place: Callable[[str], Path]) -> None:
    """On the small build, in the order of the page."""
    if page.endswith("triton.md"):
        needs_triton_client()
    _run([one for one in RUN if one.page == page and not _is_dear(one)], place(page))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", WITH_DEAR)
def test_what_is_dear_runs_on_small_sets(page: str, place: Callable[[str], Path]) -> None:
    """All of a page in its order, with the demo's model and a hundredth of its data: its name means that here."""
    folder = place(page)
    for words in BEFORE.get(page, []):
        _invoke(words)
    if page.endswith("migrate.md"):
        _stored(folder)
    _run([one for one in RUN if one.page == page], folder)


def _stored(folder: Path) -> None:
    """Embeddings of the unedited model with their keys, as another library could have made them."""
    evidence = load_file(folder / "dist/demo/evidence/reference.safetensors")
    original = EmbeddedSet.from_tensors(evidence, "original")
    np.save(folder / "images.npy", original.safe_image)
    put(folder / "images.txt", "".join(f"{item}/safe\n" for item in original.ids))


def _run(found: list[Command], folder: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for one in found:
        if one.python:
            exec(compile(one.text, f"{one.page}:{one.line}", "exec"), names)
        elif " look " in one.words:
            looked_at(_small(one.words), folder)
        elif one.words.startswith("uwm-deploy "):
            _invoke(one.words, REFUSED.get((one.page, one.words), 0))
        else:
            environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            subprocess.run(["bash", "-ec", one.words], cwd=folder, env=environment, check=True, capture_output=True)


def _invoke(command: str, wanted: int = 0) -> None:
    done = CliRunner().invoke(cli, _small(command)[1:])
    verdict = done.exit_code in (3, 4) and not MAY_FAIL.isdisjoint(command.split())
    assert done.exit_code == wanted or verdict, (command, done.output[-2000:])


def _small(command: str) -> list[str]:
    """The words of a command, with the small sets for the demo's."""
    sets = {"demo": "cal.toml", "demo-head": "cal.toml", "demo-test": "eval.toml", "demo-validation": "eval.toml"}
    words = shlex.split(command)
    for n, word in enumerate(words):
        if words[n - 1] == "--model" and word == "demo":
            words[n] = "demo.toml"
        elif words[n - 1] in ("--calibration", "--evaluation", "--on", "--against", "--train-on", "--validation"):
            words[n] = sets.get(word, word)
        elif words[n - 1] == "--compare":
            words[n] = re.sub(r"=demo\b(?!\.)", "=demo.toml", word)
    judged = words[1] in ("build", "refit") or words[1:3] == ["baseline", "set"]
    return [*words, "--policy", "loose.toml"] if judged and "--policy" not in words else words


def looked_at(words: list[str], folder: Path) -> None:
    """Serves the page of a search, and asks for it."""
    command = [sys.executable, "-m", "uwm_deploy.cli", *words[1:], "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as page:
        assert page.stderr is not None
        try:
            found = re.match(r"(http://\S+)", page.stderr.readline())
            assert found is not None
            with urllib.request.urlopen(found[1], timeout=60) as answer:
                assert "After the edit" in answer.read().decode()
        finally:
            page.terminate()


@pytest.fixture
def place(tmp_path: Path, built: tuple[Request, Outcome], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A folder as a reader of the page has it."""
    request, _ = built

    def ready(page: str) -> Path:
        assert request.out is not None
        assert request.work is not None
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("BROWSER", "true")
        shutil.copytree(request.out, tmp_path / "dist" / "demo")
        shutil.copytree(request.work, tmp_path / ".uwm" / "demo")
        shutil.copytree(ROOT / "ci", tmp_path / "ci")
        (tmp_path / "docs").symlink_to(ROOT / "docs")
        write_sets(tmp_path)
        calibration = (tmp_path / "cal.toml").read_text().replace("limit = 96", CALIBRATION.get(page, "limit = 160"))
        put(tmp_path / "cal.toml", calibration)
        recipe = (ROOT / "export" / "demo.toml").read_text()
        for name in ("demo", "mine", "path/to/recipe"):
            up = "../" * name.count("/")  # a set's path starts at the recipe's folder
            own = recipe.replace('"demo-test"', f'"{up}eval.toml"')
            own = own.replace('calibration = "demo"', f'calibration = "{up}cal.toml"')
            put(tmp_path / f"{name}.toml", own.replace('name = "demo"', f'name = "{Path(name).name}"'))
        put(tmp_path / "loose.toml", LOOSE)
        for name in ("photo.jpg", "a.jpg", "b.jpg", "b.png"):
            Image.new("RGB", (60, 50), (200, 30, 40)).save(tmp_path / name)
        _data(tmp_path, page)
        return tmp_path

    return ready


def _data(folder: Path, page: str) -> None:
    """Data under the names that the page uses."""
    for number in range(8):
        for concept in ("fire", "smoke"):
            for side in ("safe", "unsafe"):
                name = f"{concept}/{side}/{number:04d}"
                if page.endswith("reference/data.md") and name == "smoke/unsafe/0006":
                    continue
                put(folder / f"pictures/{name}.png", png(number * 4 + len(side) + len(concept) * 50))
                put(folder / f"pictures/{name}.txt", f"{side} {number} {concept}")
        for n, side in enumerate(("calm", "wild")):
            put(folder / side / f"{number}.png", png(number + 100 * n))
            put(folder / side / f"{number}.txt", f"{side} {number}")
        put(folder / "photos" / f"kind{number % 2}" / f"{number}.png", png(number))
    for name, split in (("my-train", "calibration"), ("my-test", "test")):
        text = (folder / ("cal.toml" if split == "calibration" else "eval.toml")).read_text()
        put(folder / f"{name}.toml", re.sub(r'name = ".*"', f'name = "{name}"', text))
    if page.endswith("embedding.md"):
        for number in range(100):
            write_shard(folder / "shards" / f"{number:05d}.tar", {f"i{number}.png": png(number)})
    else:
        write_shard(folder / "shards" / "all.tar", {k: v for n in range(4) for k, v in members(f"i{n}", n).items()})
