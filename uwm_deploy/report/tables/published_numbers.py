"""Published numbers next to measured ones: the table and the lines below it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from uwm_deploy.records.reproduction import Agreement, ReproducedNumber, ReproducedRow, Reproduction
from uwm_deploy.report.lines import Whole
from uwm_deploy.report.markdown_table import markdown_table
from uwm_deploy.report.paper_table import MEAN
from uwm_deploy.report.terminal import print_line, print_lines, print_rows

_STYLES = {Agreement.WITHIN.value: "green", Agreement.OUTSIDE.value: "bold red", Agreement.NOT_RUN.value: "yellow"}
_ABSENT = "-"
_NOT_RUN = ReproducedNumber(column=_ABSENT, published=None, tolerance=None, measured=None, result=Agreement.NOT_RUN)
"""The one cell of a row that was not run."""


def print_reproduction(result: Reproduction, *, markdown: bool = False) -> None:
    """Title, table, and why what was not run was not.

    Args:
        result: What was measured.
        markdown: The table in Markdown.
    """
    rows = reproduced_rows(result)
    if markdown:
        print_lines([result.title, "", *map(Whole, markdown_table(rows).split("\n")), ""])
    else:
        print_line(result.title)
        print_rows(rows, group="model" if "metric" in rows[0] else "", styles=_STYLES)
    print_lines(reproduction_lines(result))


def reproduced_rows(result: Reproduction) -> list[dict[str, str]]:
    """One line per number, or per row that was not run; without the columns that nothing is in."""
    rows = [_line(row, cell) for row in result.rows for cell in row.cells or [_NOT_RUN]]
    keys = [key for key in rows[0] if any(row[key] != _ABSENT for row in rows)]
    return [{key: row[key] for key in keys} for row in rows]


def _line(row: ReproducedRow, cell: ReproducedNumber) -> dict[str, str]:
    return {
        "model": row.label,
        "metric": cell.column,
        "published": _number(cell.published),
        "measured": _number(cell.measured),
        "95% interval": f"{cell.low:.1f} to {cell.high:.1f}" if cell.low is not None else _ABSENT,
        "n": f"{cell.n} sets" if cell.column == MEAN else str(cell.n or _ABSENT),
        "difference": _difference(cell),
        "tolerance": _number(cell.tolerance),
        "result": cell.result.value,
    }


def reproduction_lines(result: Reproduction) -> list[str]:
    """What stands below the table: what was not run or cannot be compared and why, the source, the count."""
    absent = [row for row in result.rows if not row.cells]
    cells = [cell for row in result.rows for cell in row.cells]
    counts = Counter(cell.result for cell in cells)
    ran = sum(any(cell.measured is not None for cell in row.cells) for row in result.rows)
    counted = ", ".join(f"{counts[kind]} {kind.value}" for kind in Agreement if counts[kind])
    reasons: dict[str, list[str]] = {}
    for row in absent:
        reasons.setdefault("; ".join(filter(None, (row.reason, row.fix))), []).append(row.label)
    return [
        *(f"not run: {', '.join(labels)}: {reason}" for reason, labels in reasons.items()),
        *_reasons(cells),
        f"source: {result.source}",
        f"note: {result.note}",
        f"{ran} of {len(result.rows)} rows ran{f'; numbers: {counted}' if counted else ''}",
    ]


def _reasons(cells: Sequence[ReproducedNumber]) -> list[str]:
    """One line per reason of single numbers."""
    columns: dict[tuple[str, str], dict[str, None]] = {}
    for cell in cells:
        if cell.reason:
            columns.setdefault((cell.result.value, cell.reason), {})[cell.column] = None
    whole = {cell.column for cell in cells}
    return [
        f"{kind}: {'all' if set(names) == whole else ', '.join(names)}: {reason}"
        for (kind, reason), names in columns.items()
    ]


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.1f}"


def _difference(cell: ReproducedNumber) -> str:
    return _ABSENT if cell.measured is None or cell.published is None else f"{cell.measured - cell.published:+.1f}"
