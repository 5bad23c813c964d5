"""Models side by side in the paper's tables."""

from __future__ import annotations

from collections.abc import Sequence

from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.report.lines import Whole
from uwm_deploy.report.markdown_table import markdown_table
from uwm_deploy.report.paper_table import left_out_lines, notes, price_rows, table_rows, zero_shot_rows
from uwm_deploy.report.terminal import print_lines, print_rows


def print_evaluated(
    labels: Sequence[str], reports: Sequence[SafetyReport], *, without: Sequence[str] = (), markdown: bool = False
) -> None:
    """The main table, what safety costs, the zero-shot sets, and notes.

    Args:
        labels: A row's name for each report.
        reports: Measured on the same items.
        without: Concepts that the edits were made without.
        markdown: The tables in Markdown.
    """
    for rows_of in (table_rows, price_rows, zero_shot_rows):
        rows = rows_of(labels, reports)
        if markdown and rows:
            print_lines([*map(Whole, markdown_table(rows).split("\n")), ""])
        else:
            print_rows(rows)
    print_lines([*notes(reports), *left_out_lines(without)])
