"""Processes, however they are started: an encoder is of the process that opened it, and says so elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_forked_process_is_told_and_never_hangs(built) -> None:
    """Under load, every call of the copied encoder is refused at once and the process ends cleanly.

    The parent, and processes that were forked or spawned and open the bundle themselves, serve the right rows.
    """
    request, _ = built
    code = [sys.executable, "-m", "tests.forked_encoder", str(request.out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(code, capture_output=True, text=True, timeout=180, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for calls in found["children"]:
        assert calls.pop("close") == "None"
        assert calls.pop("selftest") == "False"
        assert calls.pop("registry") == "[]"
        assert set(calls.values()) == {"refused"}, calls
    assert found["statuses"] == [0] * len(found["children"])
    assert found["codes"] == {"fork": 0, "spawn": 0}
    assert (found["wrong"], found["threads"], found["alive"]) == (0, 0, True)
