"""The whole self-test, and its tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from uwm_deploy.errors import InputError
from uwm_deploy.records.studies import FaultResult, Rebuild, SelftestReport
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.markdown_table import markdown_of_cells
from uwm_deploy.runtime.versions import versions
from uwm_deploy.studies.selftest.faults import plant_all
from uwm_deploy.studies.selftest.peers import Peers
from uwm_deploy.studies.selftest.rebuilds import rebuild_all, variations
from uwm_deploy.studies.selftest.world import POLICY, Worlds
from uwm_deploy.studies.selftest.zoo import FAULTS, Fault

Progress = Callable[[str, int, int], None]

_PACKAGES = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "polygraphy", "numpy")


def selftest(folder: Path, names: Sequence[str], rebuilds: int, *, peers: bool, progress: Progress) -> SelftestReport:
    """Plants faults in one process while another one rebuilds.

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
        waiting = pool.submit(rebuilt, folder / "rebuilds", rebuilds)
        found = tuple(plant_all(Worlds(folder), faults, Peers() if peers else None, progress))
        progress("waiting for honest rebuilds", 0, max(rebuilds, 1))
        honest = waiting.result()
    return SelftestReport(
        policy=POLICY,
        faults=found,
        rebuilds=honest,
        seconds=time.monotonic() - started,
        versions=versions(_PACKAGES),
    )


def rebuilt(folder: Path, count: int) -> tuple[Rebuild, ...]:
    """All honest rebuilds."""
    return tuple(rebuild_all(folder, variations(count), lambda *_: None))


def _chosen(names: Sequence[str]) -> tuple[Fault, ...]:
    known = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"there is no fault {unknown[0]!r}", fix=f"known: {', '.join(known)}")
    return tuple(known[name] for name in names) if names else FAULTS


def passed(report: SelftestReport) -> bool:
    """Whether every fault was named and every honest rebuild passed."""
    return all(f.named for f in report.faults) and all(r.result is Result.PASS for r in report.rebuilds)


def fault_rows(report: SelftestReport) -> list[dict[str, str]]:
    """One row per fault."""
    tools = sorted({name for fault in report.faults for name in fault.peers})
    return [
        {
            "fault": fault.name,
            "what is wrong": fault.text,
            "must name": f"{fault.cause.value} @ {fault.stage}",
            "named": _named(fault),
            "detected by": ", ".join(fault.detectors) or "nothing",
        }
        | {tool: _peer(fault, tool) for tool in tools}
        for fault in report.faults
    ]


def _named(fault: FaultResult) -> str:
    if fault.named:
        return "yes"
    return f"no: {fault.found_cause.value} @ {fault.found_stage}" if fault.found_cause else "no: not detected"


def _peer(fault: FaultResult, tool: str) -> str:
    """Where there is no artifact to check, a tool has no way to see the fault."""
    return {True: "caught", False: "passes"}[fault.peers[tool]] if tool in fault.peers else "-"


def summary_lines(report: SelftestReport) -> list[str]:
    """The numbers that count."""
    lines = []
    if report.faults:
        named = sum(fault.named for fault in report.faults)
        lines.append(f"faults: {named} of {len(report.faults)} fail the gate with the right cause and stage")
        for tool in sorted({name for fault in report.faults for name in fault.peers}):
            seen = [fault.peers[tool] for fault in report.faults if tool in fault.peers]
            lines.append(f"  {tool}: catches {sum(seen)} of them ({len(seen)} have an artifact that it can look at)")
    if report.rebuilds:
        failed = [rebuild for rebuild in report.rebuilds if rebuild.result is not Result.PASS]
        lines.append(f"honest rebuilds: {len(failed)} of {len(report.rebuilds)} do not pass")
        lines += [f"  {rebuild.what}: {rebuild.result.value}: {'; '.join(rebuild.failing)}" for rebuild in failed]
    return [*lines, f"{report.seconds:.0f} s, policy {report.policy}"]


def markdown_of(report: SelftestReport) -> str:
    """The table of faults and detectors, for a page."""
    rows = fault_rows(report)
    table = markdown_of_cells(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""
    return "\n".join([*(f"    {line}" for line in summary_lines(report)), "", table, ""])
