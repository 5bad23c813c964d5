"""How many cores this process may use, which in a container is not how many there are; and how its threads wait."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")

_SPINS = "1000"
"""A few microseconds: enough where every thread has a core, and next to nothing where a neighbour holds it."""

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that say how threads of OpenMP wait for each other."""


def affinity() -> int:
    """Cores that this process may be put on, whatever time it is given there."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(quota_file: Path = _QUOTA) -> float | None:
    """Cores' time that the control group of a container is given; None where there is no limit."""
    try:
        given, period = quota_file.read_text().split()
        return int(given) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no control group, or no limit ("max")
        return None


def cores(quota_file: Path = _QUOTA) -> int:
    """Cores of this process's affinity, at most those its control group is given time for; at least 1."""
    limit = quota(quota_file)
    return affinity() if limit is None else max(1, min(affinity(), math.ceil(limit)))


def fit_to_machine(quota_file: Path = _QUOTA) -> None:
    """PyTorch takes as many threads as there is time for, and they hardly spin; the user's own variables win.

    By default PyTorch counts the cores of the host, and each thread spins for milliseconds at every small operation: in a
    container with a quota, or beside other programs, a build takes several times as long. OpenMP reads its variables when it
    is loaded, so this comes before PyTorch is imported.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    if (count := cores(quota_file)) < affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(count))
