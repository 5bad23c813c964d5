"""Published numbers of captions and pictures beside those of reports that `uwm-deploy downstream` wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from uwm_deploy.errors import InputError
from uwm_deploy.recipes.published import PublishedOutputs, PublishedRow
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.downstream import ANY, UNSAFE, DownstreamReport, Flagged, Scored
from uwm_deploy.records.metrics import Estimate, Proportion
from uwm_deploy.records.reproduction import Agreement, ReproducedNumber, ReproducedRow, Reproduction

_OWN_JUDGE = "the published number has a judge of its own"
_JUDGES = {"nudenet or q16": ANY}
"""Column to the judge of a report, where they are not called alike."""


def reports_from(texts: Sequence[str]) -> dict[str, Path]:
    """Parses ``ROW=FILE``.

    Raises:
        InputError: If one is not of that form.
    """
    found: dict[str, Path] = {}
    for text in texts:
        row, equals, file = text.rpartition("=")
        if not equals or not row or not Path(file).is_file():
            raise InputError(
                f"--downstream {text!r} is not understood", fix="write ROW=FILE, with a file that is there"
            )
        found[row] = Path(file)
    return found


def reproduced_outputs(name: str, table: PublishedOutputs, files: Mapping[str, Path]) -> Reproduction:
    """Every row beside its report; a row without one is "not run".

    Args:
        name: Of the table.
        table: What is published.
        files: Row to report.

    Raises:
        InputError: If there is no such row, or a report is of another kind.
        IntegrityError: If a file is no such report.
    """
    labels = [row.label for row in table.rows]
    if unknown := [label for label in files if label not in labels]:
        raise InputError(f"{name} has no row {unknown[0]!r}", fix=f"its rows: {', '.join(labels)}")
    reports = {label: read_record(DownstreamReport, file) for label, file in files.items()}
    if other := [label for label, report in reports.items() if report.kind != table.kind]:
        raise InputError(f"the report of {other[0]!r} is no {table.kind}.json", fix=f"pass the {table.kind}.json")
    rows = tuple(_row(table, row, reports.get(row.label), own=row is table.rows[0]) for row in table.rows)
    return Reproduction(table=name, title=table.title, source=table.source, note=table.note, rows=rows)


def _row(table: PublishedOutputs, row: PublishedRow, report: DownstreamReport | None, *, own: bool) -> ReproducedRow:
    cells = []
    for column, value in zip(table.columns, row.values, strict=True):
        cell = ReproducedNumber(
            column=column, published=value, tolerance=None, measured=None, result=Agreement.NOT_RUN, reason=_why(table)
        )
        found = None if report is None else _number(report, column, own=own)
        if report is not None and found is None:
            cell = dataclasses.replace(cell, reason=f"the report has no {column}")
        if found is not None:
            cell = dataclasses.replace(
                cell,
                measured=found.value,
                low=found.low,
                high=found.high,
                n=found.n,
                result=Agreement.NOT_COMPARABLE,
                reason=_OWN_JUDGE if column != "rouge_l" else "captions of other weights or another set may differ",
            )
        cells.append(cell)
    return ReproducedRow(label=row.label, model=row.model, method=row.method, cells=tuple(cells))


def _why(table: PublishedOutputs) -> str:
    return f"measure it with `uwm-deploy downstream {table.kind}`, and pass --downstream ROW=FILE"


def _number(report: DownstreamReport, column: str, *, own: bool) -> Proportion | Estimate | None:
    """A report's number for a column: of the model's own tower, or of the edited one."""
    part: Flagged | Scored | None
    if column in report.reference:
        part = report.reference[column].get(UNSAFE)
    else:
        judge = _JUDGES.get(column, column)
        chosen = judge if judge in report.flagged else ANY if report.kind == "draw" else ""
        part = report.flagged.get(chosen, {}).get(UNSAFE)
    if part is None:
        return None
    return part.original if own else part.edited
