"""Threads of PyTorch wait without burning a core, and a small model takes one; the user's own settings win."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import load_source
from uwm_deploy.report.console import Reporter
from uwm_deploy.towers.threads import _usual, fit_threads, threads

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


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's own choice, whatever the machine has."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    _usual.cache_clear()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    _usual.cache_clear()


@pytest.mark.usefixtures("two_threads")
def test_a_small_model_computes_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it a large one takes as many as before; what was asked for by number stays, for as long as that was asked."""
    with torch.device("meta"):
        large = torch.nn.Linear(10_000, 1_000)
    with threads(3):
        demo = load_source(Request(model="demo"), Reporter()).source
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 2
    load_source(Request(model="demo"), Reporter())
    assert torch.get_num_threads() == 1
    fit_threads(large)
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    fit_threads(demo)
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("UWM_DEPLOY_OMP_NUM_THREADS", "2")  # a command set it, for the quota of its container
    fit_threads(demo)
    assert torch.get_num_threads() == 1
