"""One command of this program in a process of its own, and what it used."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.errors import PrerequisiteError

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a command used.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Time on processors, processes that it started included.
        peak_rss_bytes: Most memory of one process.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def run_measured(words: Sequence[str]) -> Usage:
    """Runs `uwm-deploy WORDS...` to its end; its standard output is dropped, its errors are shown.

    Raises:
        PrerequisiteError: If it ends with an error, which it has said itself.
    """
    found = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_PACKAGE_ROOT), *found])}
    command = [sys.executable, "-P", "-m", "uwm_deploy.cli", *words]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)  # noqa: S603 -- this program
    try:
        _, status, usage = os.wait4(child.pid, 0)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise PrerequisiteError(
            f"`uwm-deploy {' '.join(words[:2])}` ended with exit code {child.returncode}; its error is above",
            fix="run it alone",
        )
    return Usage(
        seconds=time.perf_counter() - started,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=usage.ru_maxrss * 1024,
    )
