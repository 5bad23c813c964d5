"""docs/how-to/fault-walkthrough.md: its commands end as it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "fault-walkthrough.md").read_text()
COMMANDS = re.findall(r"^    ((?:uwm-deploy|python|rm) .+)$", PAGE, re.MULTILINE)


def _run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = command.split()
    programs = {"uwm-deploy": [sys.executable, "-m", "uwm_deploy.cli"], "python": [sys.executable], "rm": ["rm"]}
    rest = [str(ROOT / word) if word.startswith("docs/") else word for word in words[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*programs[words[0]], *rest], cwd=folder, capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five builds and exports
def test_the_commands_of_the_walk_through_end_as_it_says(tmp_path: Path) -> None:
    """The honest build passes; both faults end with exit code 3, the cause, the stage and the words of the page."""
    found = {command: _run(command, tmp_path) for command in COMMANDS}
    built = {command.rpartition("/")[2]: done for command, done in found.items() if " build " in command}
    assert {name: done.returncode for name, done in built.items()} == {"honest": 0, "magenta": 3, "captions": 3}
    assert all(done.returncode == 0 for command, done in found.items() if " build " not in command)
    for name, words in (
        ("magenta", ("structure of the image tower", "that no edited layer is on", "Slice of pixel_values")),
        ("captions", ("structure of the text tower", "Slice of input_ids")),
    ):
        first = next(line for line in built[name].stdout.splitlines() if line.startswith("cause: "))
        assert first.startswith("cause: graph @ export: ")
        assert all(part in first for part in words), first
    for text in re.findall(r"cause: graph @ export: (.+?);", PAGE.replace("\n    ", " ")):
        assert any(text in done.stdout for done in built.values()), text
