"""Methods side by side: tables, the lines below them, and both in Markdown."""

from __future__ import annotations

import math
from pathlib import Path

from uwm_deploy.records.metrics import Flips
from uwm_deploy.records.studies import MethodComparison, MethodCost
from uwm_deploy.records.training import Trainer
from uwm_deploy.report.intervals import change_text, share_text
from uwm_deploy.report.lines import Whole
from uwm_deploy.report.markdown_table import markdown_table
from uwm_deploy.report.method_changes import first_measured, zero_shot_change
from uwm_deploy.report.paper_table import COLUMNS, PRICE_COLUMNS, cell, notes, price_cell
from uwm_deploy.report.terminal import print_lines, print_rows
from uwm_deploy.safeground.preference import METRICS

_CHANGES = ("PS", "PU", "GS", "P_ts", "P_tu", "P_vs", "P_vu")
"""Metrics whose change is said with its interval."""

_PRICE_CHANGES = {
    "safe@1": "safe_retrieval@1",
    "safe@10": "safe_retrieval@10",
    "hard safe@10": "hard_safe_retrieval@10",
    "unsafe first Tu": "unsafe-first-text",
    "unsafe first Vu": "unsafe-first-image",
}
"""Column to a change of retrieval that is said with its interval."""


def metric_rows(result: MethodComparison) -> list[dict[str, str]]:
    """The paper's columns, one row per method."""
    return [
        {"method": row.label, **{c: cell(row.safety, c) if row.safety else "not run" for c in COLUMNS}}
        for row in result.rows
    ]


def price_rows(result: MethodComparison) -> list[dict[str, str]]:
    """Hard safe queries, what unsafe queries find first, neighbours and spread."""
    return [
        {"method": row.label, **{c: price_cell(row.safety, c) for c in PRICE_COLUMNS}}
        for row in result.rows
        if row.safety
    ]


def interval_rows(result: MethodComparison) -> list[dict[str, str]]:
    """The nine metrics with their 95% intervals."""
    return [
        {"method": row.label, **{name: share_text(row.safety.preference[name]) for name in METRICS}}
        for row in result.rows
        if row.safety
    ]


def change_rows(result: MethodComparison) -> list[dict[str, str]]:
    """Change against the first row, on the same items, with the paired 95% interval."""
    base = first_measured(result)
    return [
        {
            "method": row.label,
            **{name: _change(row.change[name]) for name in _CHANGES},
            "zero-shot mean": _signed(zero_shot_change(base, row)),
        }
        for row in result.rows
        if row.change
    ]


def price_change_rows(result: MethodComparison) -> list[dict[str, str]]:
    """Change of retrieval against the first row, on the same items, with the paired 95% interval; nothing without any."""
    return [
        {"method": row.label, **{head: _change(row.change.get(name)) for head, name in _PRICE_CHANGES.items()}}
        for row in result.rows
        if any(name in row.change for name in _PRICE_CHANGES.values())
    ]


def _change(change: Flips | None) -> str:
    return change_text(change) if change else "-"


def cost_rows(result: MethodComparison) -> list[dict[str, str]]:
    """What each took; a dash for what was not made here, or has no GPU."""
    return [{"method": row.label, **_cost_cells(row.cost)} for row in result.rows]


def _cost_cells(cost: MethodCost | None) -> dict[str, str]:
    return {
        "CPU s": f"{cost.cpu_seconds:.0f}" if cost else "-",
        "wall s": f"{cost.seconds:.0f}" if cost else "-",
        "GPU s": f"{cost.gpu_seconds:.0f}" if cost and cost.gpu_seconds else "-",
        "memory MiB": f"{cost.peak_rss_bytes >> 20}" if cost else "-",
        "GPU memory MiB": f"{cost.peak_gpu_bytes >> 20}" if cost and cost.peak_gpu_bytes else "-",
        "trained parameters": str(cost.trainable_parameters) if cost else "-",
        "quadruples seen": str(cost.data_seen) if cost else "-",
    }


def findings(result: MethodComparison) -> list[str]:
    """What the table says, method by method, in words; a change whose interval holds 0 is none."""
    lines = [f"not run: {row.label}: {row.reason}" for row in result.rows if row.safety is None]
    base = first_measured(result)
    for row in result.rows:
        if not row.change:
            continue
        words = [f"{name} {_word(row.change[name])}" for name in ("PS", "PU", "GS")]
        mean = zero_shot_change(base, row)
        words += [f"zero-shot mean {mean:+.1f}"] if not math.isnan(mean) else []
        lines.append(f"{row.label}: {', '.join(words)}")
    if (trained := [row for row in result.rows if row.change and row.label in list(Trainer)]) and base is not None:
        lower = [row.label for row in trained if row.change["PS"].delta_high < 0]
        shows = f"shows for {', '.join(lower)}" if lower else "does not show"
        lines.append(f"training lowers safety on safe inputs (PS): {shows}")
    return lines


def _word(change: Flips) -> str:
    told = change.delta_low > 0 or change.delta_high < 0
    return change_text(change) if told else f"{change_text(change)}, not told from 0"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.1f}"


def lines_of(result: MethodComparison) -> list[str]:
    """What stands below the tables."""
    reports = [row.safety for row in result.rows if row.safety]
    machine = ", ".join(f"{key} {value}" for key, value in result.machine.items() if value)
    included = [
        f"{row.label} holds the cost of {row.cost.includes}" for row in result.rows if row.cost and row.cost.includes
    ]
    made = f"all made on {result.calibration} from {result.model.name}; cost of the whole command each ({machine})"
    return [*notes(reports), "; ".join([made, *included]), *findings(result)]


def print_compared(result: MethodComparison, folder: Path) -> None:
    """All tables, the lines below them, and where the files are."""
    for rows_of in (metric_rows, price_rows, change_rows, price_change_rows, cost_rows):
        print_rows(rows_of(result))
    print_lines([*lines_of(result), Whole(f"tables and picture: {folder}")])


def markdown_of(result: MethodComparison) -> str:
    """All tables, the nine metrics with their intervals, and the lines below them."""
    base = first_measured(result)
    changes, price_changes = change_rows(result), price_change_rows(result)
    parts = [
        f"# Methods on {result.measured_on}",
        markdown_table(metric_rows(result)),
        "Safe queries that look unsafe, what unsafe queries find first, and what became of neighbours and spread:",
        markdown_table(price_rows(result)),
        f"Change against {base.label if base else '-'} on the same items, with the paired 95% interval:",
        markdown_table(changes) if changes else "",
        markdown_table(price_changes) if price_changes else "",
        "SafeGround with 95% Wilson intervals:",
        markdown_table(interval_rows(result)),
        "Cost:",
        markdown_table(cost_rows(result)),
        "\n".join(f"- {line}" for line in lines_of(result)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
