"""The points of a sweep as a table, in CSV and in Markdown."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.records.studies import SweepPoint, SweepReport
from uwm_deploy.report.edit_words import axis_words
from uwm_deploy.report.lines import Whole
from uwm_deploy.report.markdown_table import inline, markdown_of_cells
from uwm_deploy.report.terminal import print_line, print_lines, print_rows
from uwm_deploy.safeground.tradeoff import mean_recall, zero_shot_mean

_ENTRY_COLUMNS = ("keep_mass", "factor", "text share %", "image share %")
_STRENGTH_COLUMNS = ("max R@1 loss", "setting")
_METRICS = ("P_ts", "P_tu", "P_vs", "P_vu", "PS", "PU", "GS")


def print_sweep(report: SweepReport, folder: Path) -> None:
    """The table, which point was picked by which rule, and where the files are.

    Args:
        report: What was measured.
        folder: Where the tables and the picture are.
    """
    rows, named = sweep_rows(report), next(iter(sweep_rows(report)[0]))
    marked = [{named: f"{row[named]} {row['picked']}".strip()} for row in rows]
    aside = {named, "picked", _STRENGTH_COLUMNS[1]}
    print_rows(
        [mark | {k: v for k, v in row.items() if k not in aside} for mark, row in zip(marked, rows, strict=True)]
    )
    print_lines(f"setting at a loss of {row[named]}: {row['setting']}" for row in rows[1:] if "setting" in row)
    if report.rule:
        print_line(f"{'nothing picked' if report.picked is None else 'picked'}: {report.rule}")
    print_line(Whole(f"table and picture: {folder}"))


def sweep_rows(report: SweepReport) -> list[dict[str, str]]:
    """The original first, then every point; the picked one is marked."""
    columns = _STRENGTH_COLUMNS if report.points and report.points[0].setting else _ENTRY_COLUMNS
    original = dict.fromkeys(columns, "-") | {columns[0]: "original"} | _cells(report.original) | {"picked": ""}
    return [
        original,
        *(
            dict(zip(columns, _setting_cells(point), strict=True))
            | _cells(point.safety)
            | {"picked": "*" if i == report.picked else ""}
            for i, point in enumerate(report.points)
        ),
    ]


def _cells(safety: SafetyReport) -> dict[str, str]:
    mean = zero_shot_mean(safety)
    return {
        **{name: f"{safety.preference[name].value:.1f}" for name in _METRICS},
        "R@1": f"{mean_recall(safety):.1f}",
        "zero-shot": "-" if math.isnan(mean) else f"{mean:.1f}",
    }


def _setting_cells(point: SweepPoint) -> tuple[str, ...]:
    if point.setting is not None:
        return f"{point.max_retrieval_loss:g}", axis_words(point.setting).removeprefix("axis ")
    shares = [f"{100 * point.shares[tower]:.2f}" for tower in ("text", "image")]
    return f"{point.keep_mass:g}", f"{point.factor:g}", *shares


def point_label(point: SweepPoint) -> str:
    """What tells a point from the others of its sweep."""
    return f"{point.keep_mass:.3g}" if point.max_retrieval_loss is None else f"{point.max_retrieval_loss:g}"


def sweep_csv(report: SweepReport) -> str:
    """The table in CSV."""
    rows = sweep_rows(report)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def sweep_markdown(report: SweepReport) -> str:
    """The table in Markdown."""
    rows = sweep_rows(report)
    return markdown_of_cells(list(rows[0]), [[inline(str(value)) for value in row.values()] for row in rows]) + "\n"
