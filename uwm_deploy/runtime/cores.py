"""How many cores this process may use, which in a container is not how many there are."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")

_SPINS = "1000"
"""A few microseconds: enough where every thread has a core, and next to nothing where a neighbour holds it."""

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that say how threads of OpenMP wait for each other."""


def cores(quota_file: Path = _QUOTA) -> int:
    """Cores of this process's affinity, at most those its control group is given time for; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        limit = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return allowed
    return max(1, min(allowed, limit))


def wait_without_spinning() -> None:
    """Threads of PyTorch hardly spin at barriers, unless the environment says how they wait.

    By default each spins for milliseconds at every small operation: beside other programs a build takes ten times as long.
    OpenMP reads the variable when it is loaded, so this comes before PyTorch is imported.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
