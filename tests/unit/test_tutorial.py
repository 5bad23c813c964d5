"""The last section of docs/tutorial.md, run as it stands: it ends with a bundle that opens, is gated and is looked at."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "uwm_deploy" / "data" / "demo" / "model"


def _words(command: str) -> list[str]:
    words = shlex.split(command)
    return [sys.executable, *(["-m", "uwm_deploy.cli"] if words[0] == "uwm-deploy" else []), *words[1:]]


@pytest.mark.slow
def test_your_own_data_end_with_a_bundle_that_opens(tmp_path: Path) -> None:
    """Slow, because it is a whole build on 512 quadruples of somebody's own."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    section = text[text.index("## 7.") :]
    (draw,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    train, test = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    commands = re.findall(r"^    (uwm-deploy .*|python -c .*)$", section, re.MULTILINE)
    names = [command.split()[1] for command in commands]
    assert names == ["init", "data", "data", "data", "build", "gate", "-c", "look"]
    for command in commands[:-1]:
        done = subprocess.run(
            _words(command), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        if command.split()[1] == "init":
            subprocess.run([sys.executable, "-c", draw], cwd=tmp_path, env=environment, check=True)
            (tmp_path / "my-project" / "train.toml").write_text(train, encoding="utf-8")
            (tmp_path / "my-project" / "test.toml").write_text(test, encoding="utf-8")
            _own_checkpoint(tmp_path / "my-project", section)
    assert done.stdout.strip() == "onnxruntime-fp32"
    _look(_words(commands[-1]), tmp_path, environment)


def _own_checkpoint(project: Path, section: str) -> None:
    """A folder of weights beside the recipe, named in it as the page says."""
    now, before = re.findall(r"`(repo = \S+)`", section)
    shutil.copytree(MODEL, project / "clip")
    recipe = project / "my-project.toml"
    text = recipe.read_text(encoding="utf-8")
    assert before in text
    recipe.write_text(text.replace(before, now), encoding="utf-8")


def _look(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    """The page of a search comes, with both rankings."""
    with subprocess.Popen(
        [*words, "--port", "0"], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    ) as page:
        assert page.stderr is not None
        found = re.match(r"(http://\S+)", page.stderr.readline())
        try:
            assert found is not None
            with urllib.request.urlopen(found[1], timeout=60) as answer:
                body = answer.read().decode()
        finally:
            page.terminate()
    assert "Before the edit" in body
    assert "After the edit" in body
    assert body.count("<img ") == 24
