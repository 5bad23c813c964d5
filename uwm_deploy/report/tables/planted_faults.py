"""Tables of the self-test: planted faults, what detected them, and honest rebuilds that do not pass."""

from __future__ import annotations

from uwm_deploy.records.studies import FaultResult, SelftestReport
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.markdown_table import inline, markdown_of_cells


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
    if fault.found_cause is None:
        return "no: not detected"
    return f"no: {', '.join([f'{fault.found_cause.value} @ {fault.found_stage}', *fault.further])}"


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
    table = (
        markdown_of_cells(list(rows[0]), [[inline(str(value)) for value in row.values()] for row in rows])
        if rows
        else ""
    )
    return "\n".join([*(f"    {line}" for line in summary_lines(report)), "", table, ""])
