"""The whole self-test, and its tables."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from uwm_deploy.errors import InputError
from uwm_deploy.records.studies import Rebuild, SelftestReport
from uwm_deploy.records.verdict import Result
from uwm_deploy.runtime.versions import versions
from uwm_deploy.studies.selftest.faults import plant_all
from uwm_deploy.studies.selftest.honest_builds import POLICY, HonestBuilds
from uwm_deploy.studies.selftest.peers import Peers
from uwm_deploy.studies.selftest.rebuilds import PER_EDIT, rebuild_all, variations
from uwm_deploy.studies.selftest.zoo import FAULTS, Fault
from uwm_deploy.towers.threads import threads

Progress = Callable[[str, int, int], None]

_PACKAGES = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "polygraphy", "numpy")


def selftest(folder: Path, names: Sequence[str], rebuilds: int, *, peers: bool, progress: Progress) -> SelftestReport:
    """Plants faults in one process while another one rebuilds; who has finished takes what is left of the rebuilds.

    Args:
        folder: For everything that is made; removed by whoever made it.
        names: Faults to plant; all when empty.
        rebuilds: Number of honest rebuilds.
        peers: Put the artifacts through other tools' checks as well.
        progress: Called as it goes on.

    Raises:
        InputError: If a fault does not exist.
        ContractError: If an honest build does not pass, so that nothing can be said.
    """
    faults, started = _chosen(names), time.monotonic()
    # A process of its own: both use one core each, and threads would fight over PyTorch's settings.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(rebuilt, folder / "rebuilds", rows) for rows in groups(rebuilds)]
        with threads(1) if rebuilds else contextlib.nullcontext():
            found = tuple(plant_all(HonestBuilds(folder), faults, Peers() if peers else None, progress))
        honest = _finished(waiting, folder / "rebuilds", groups(rebuilds), progress)
    return SelftestReport(
        policy=POLICY,
        faults=found,
        rebuilds=tuple(part for group in honest for part in group),
        seconds=time.monotonic() - started,
        versions=versions(_PACKAGES),
    )


def groups(count: int) -> list[range]:
    """Numbers of the honest rebuilds, those of one edit together."""
    return [range(start, min(start + PER_EDIT, count)) for start in range(0, count, PER_EDIT)]


def rebuilt(folder: Path, numbers: range) -> tuple[Rebuild, ...]:
    """Some honest rebuilds, by their numbers."""
    return tuple(rebuild_all(folder, variations(numbers.stop)[numbers.start :], lambda *_: None))


def _finished(
    waiting: Sequence[Future[tuple[Rebuild, ...]]], folder: Path, numbers: Sequence[range], progress: Progress
) -> list[tuple[Rebuild, ...]]:
    """All rebuilds; from the last one on, those that the other process has not begun are made here."""
    here: dict[int, tuple[Rebuild, ...]] = {}
    for place in reversed(range(len(waiting))):
        if waiting[place].cancel():
            here[place] = rebuilt(folder, numbers[place])
            progress("honest rebuilds", len(here), len(waiting))
    progress("waiting for honest rebuilds", 0, max(len(waiting), 1))
    return [here[place] if place in here else future.result() for place, future in enumerate(waiting)]


def _chosen(names: Sequence[str]) -> tuple[Fault, ...]:
    known = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"there is no fault {unknown[0]!r}", fix=f"known: {', '.join(known)}")
    return tuple(known[name] for name in names) if names else FAULTS


def passed(report: SelftestReport) -> bool:
    """Whether every fault was named and every honest rebuild passed."""
    return all(f.named for f in report.faults) and all(r.result is Result.PASS for r in report.rebuilds)
