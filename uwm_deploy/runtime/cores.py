"""How many cores this process may use, which in a container is not how many there are; and how its threads wait."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
"""Where the system shows control groups, of either version."""

_OWN = Path("/proc/self/cgroup")
"""Names the control groups of this process."""

_THREADS, _OURS = "OMP_NUM_THREADS", "UWM_DEPLOY_OMP_NUM_THREADS"
"""OpenMP's number of threads, and what this program itself has set it to; processes that it starts are told both."""

_A_NUMBER = re.compile(r"\s*\+?(\d+)\s*(,\s*\+?\d+\s*)*")
"""What OpenMP takes: threads, and perhaps those of loops inside loops."""

_SPINS = "1000"
"""A few microseconds: enough where every thread has a core, and next to nothing where a neighbour holds it."""

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that say how threads of OpenMP wait for each other."""


def affinity() -> int:
    """Cores that this process may be put on, whatever time it is given there."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(groups: Path = _GROUPS, own: Path = _OWN) -> float | None:
    """Cores' time that the control groups of this process are given, whatever made them; None where there is no limit.

    A group has no more time than those that it is in, so the smallest limit counts. Inside a container the path of the own
    group may be one of the host that cannot be seen here. What can be seen then is the container's own group, at the top.

    Args:
        groups: Folder of the control groups.
        own: File that names those of this process.
    """
    return min((limit for folder in _folders(groups, own) for limit in _limits(folder)), default=None)


def _folders(groups: Path, own: Path) -> Iterator[Path]:
    """Folders of the groups that may limit this process, and of all groups that these are in."""
    try:
        lines = own.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    tops = {groups: "/"}
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            tops |= {groups: path, groups / "unified": path}
        elif "cpu" in controllers.split(","):
            tops |= {groups / "cpu": path, groups / controllers: path}
    for top, path in tops.items():
        inner = top / path.strip("/")
        inside = [] if ".." in inner.parts else [one for one in (inner, *inner.parents) if one.is_relative_to(top)]
        yield from inside or [top]


def _limits(folder: Path) -> Iterator[float]:
    """Limits that one folder tells, in the way of version 2 or of version 1."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            given, period = map(int, " ".join((folder / name).read_text() for name in names).split())
        except (OSError, ValueError):  # no such file, or no limit ("max")
            continue
        if given > 0 and period > 0:  # version 1 says -1 where there is no limit
            yield given / period


def cores(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """Cores of this process's affinity, at most those its control groups are given time for; at least 1."""
    limit = quota(groups, own)
    return affinity() if limit is None else max(1, min(affinity(), math.ceil(limit)))


def threads_asked() -> int | None:
    """Threads that the user's own `OMP_NUM_THREADS` asks for.

    None where it is not set, where `fit_to_machine` has set it, here or in the process that started this one, and where
    OpenMP cannot read it and goes by the cores.
    """
    said = os.environ.get(_THREADS)
    if said is None or said == os.environ.get(_OURS):
        return None
    found = _A_NUMBER.fullmatch(said)
    return (int(found[1]) or None) if found else None


def threads_not_understood() -> str | None:
    """The user's `OMP_NUM_THREADS` where OpenMP cannot read it; None where it can, and where there is none."""
    said = os.environ.get(_THREADS)
    return None if said is None or said == os.environ.get(_OURS) or threads_asked() else said


def fit_to_machine(groups: Path = _GROUPS, own: Path = _OWN) -> None:
    """PyTorch takes as many threads as there is time for, and they hardly spin; the user's own variables win.

    By default PyTorch counts the cores of the host, and each thread spins for milliseconds at every small operation: in a
    container with a quota, or beside other programs, a build takes several times as long. OpenMP reads its variables when it
    is loaded, so this comes before PyTorch is imported.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    if (count := cores(groups, own)) < affinity() and _THREADS not in os.environ:
        os.environ[_THREADS] = os.environ[_OURS] = str(count)
