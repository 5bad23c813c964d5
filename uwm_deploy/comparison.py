"""The paper's table layout of any list of reports: text cells, Markdown and plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uwm_deploy.codec import plain_from_record
from uwm_deploy.records import Proportion, SafetyReport
from uwm_deploy.safeground.preference import METRICS
from uwm_deploy.safeground.zero_shot import ZeroShotMean, mean_over_sets

MEAN = "zero-shot"
"""Column of the mean over the zero-shot sets."""

RETRIEVAL = {
    "Ts-Vs": "safe-text-to-image@1",
    "Vs-Ts": "safe-image-to-text@1",
    "Tu-Vu+s": "unsafe-text-to-union@1",
    "Vu-Tu+s": "unsafe-image-to-union@1",
}
"""The paper's column to the name in a report; recall at 1."""

COLUMNS = (MEAN, *RETRIEVAL, *METRICS)
"""The paper's main table."""


def mean_of(report: SafetyReport) -> ZeroShotMean:
    """Mean over the zero-shot sets that ran, and how many were asked for."""
    return mean_over_sets(report.zero_shot, report.zero_shot_missing)


def proportion_of(report: SafetyReport, column: str) -> Proportion | None:
    """The number of one column, by the paper's name or a zero-shot set's; None when it was not measured."""
    return (
        report.preference.get(column)
        or report.retrieval.get(RETRIEVAL.get(column, column))
        or report.zero_shot.get(column)
    )


def cell(report: SafetyReport, column: str) -> str:
    """One number with one decimal, as the paper prints it; a mean over fewer sets than asked for says so."""
    if column == MEAN:
        mean = mean_of(report)
        if mean.value is None:
            return f"not run (0/{mean.asked})" if mean.asked else "-"
        return f"{mean.value:.1f}" if mean.complete else f"{mean.value:.1f} ({mean.ran}/{mean.asked})"
    found = proportion_of(report, column)
    return f"{found.value:.1f}" if found else "-"


def table_rows(labels: Sequence[str], reports: Sequence[SafetyReport]) -> list[dict[str, str]]:
    """One row per report."""
    return [
        {"model": label, **{column: cell(report, column) for column in COLUMNS}}
        for label, report in zip(labels, reports, strict=True)
    ]


def notes(reports: Sequence[SafetyReport]) -> list[str]:
    """How many items, and every set that did not run with its reason."""
    counts = sorted({p.n for report in reports for p in report.preference.values()})
    lines = [
        f"n = {n} quadruples; retrieval is recall at 1; zero-shot is the mean of top-1 over the sets" for n in counts
    ]
    missing = {name: reason for report in reports for name, reason in report.zero_shot_missing.items()}
    return lines + [f"zero-shot {name} not run: {reason}" for name, reason in missing.items()]


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; its first column is text, the others are numbers."""
    head = list(rows[0])
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([str(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def plain_comparison(labels: Sequence[str], reports: Sequence[SafetyReport]) -> dict[str, Any]:
    """For `--json`: the table's numbers, unrounded, and the reports they are from."""
    rows = []
    for label, report in zip(labels, reports, strict=True):
        mean = mean_of(report)
        values: dict[str, float | None] = {MEAN: mean.value}
        for column in COLUMNS[1:]:
            found = proportion_of(report, column)
            values[column] = found.value if found else None
        rows.append(
            {
                "label": label,
                "values": values,
                "zero_shot_sets": {"ran": mean.ran, "asked": mean.asked},
                "report": plain_from_record(report),
            }
        )
    return {"columns": list(COLUMNS), "rows": rows}
