"""The last section of docs/tutorial.md, run as it stands: it ends with a bundle that opens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_your_own_data_end_with_a_bundle_that_opens(tmp_path: Path) -> None:
    """Slow, because it is a whole build on 512 quadruples of somebody's own."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    section = text[text.index("## 6.") :]
    (draw,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    train, test = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    (tmp_path / "my-train.toml").write_text(train, encoding="utf-8")
    (tmp_path / "my-test.toml").write_text(test, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", draw], cwd=tmp_path, env=environment, check=True)
    commands = re.findall(r"^    (uwm-deploy .*|python -c .*)$", section, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["uwm-deploy"] * 4 + ["python"]
    for command in commands:
        words = shlex.split(command.replace("MODEL", str(ROOT / "uwm_deploy" / "data" / "demo" / "model")))
        start = ["-m", "uwm_deploy.cli"] if words[0] == "uwm-deploy" else []
        done = subprocess.run(
            [sys.executable, *start, *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    assert done.stdout.strip() == "onnxruntime-fp32"
