"""Threads of PyTorch wait for each other without burning a core, unless the user says how."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOW = """
import os, sys
from uwm_deploy.cli import main
try:
    main(["--version"])
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "1000 False"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None False"),
        ({"GOMP_SPINCOUNT": "7"}, "7 False"),
        ({"KMP_BLOCKTIME": "0"}, "None False"),
    ],
)
def test_commands_set_it_before_the_library_is_there(given: dict[str, str], found: str) -> None:
    """OpenMP reads its variables once, when it is loaded; the user's own ones win."""
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    environment = clean | {"PYTHONPATH": str(ROOT)} | given
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == found
