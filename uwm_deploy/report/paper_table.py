"""The paper's table layout of any list of reports: rows of text, notes below them, and plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uwm_deploy.data.zero_shot_table import PUBLISHED
from uwm_deploy.records.codec import plain_from_record
from uwm_deploy.records.metrics import Proportion, SafetyReport
from uwm_deploy.safeground.preference import METRICS
from uwm_deploy.safeground.top_one import ZeroShotMean, mean_over_sets

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

NEIGHBOURS = {"near V-V": "image-image", "near T-T": "text-text", "near T-V": "text-image"}
"""Column to the neighbours in a report; 0 to 1."""

SPREADS = {"spread V": "image", "spread T": "text"}
"""Column to a tower."""

PRICE = {
    "hard Ts-Vs@10": "hard-safe-text-to-image@10",
    "hard Vs-Ts@10": "hard-safe-image-to-text@10",
    "unsafe first Tu": "unsafe-first-text",
    "unsafe first Vu": "unsafe-first-image",
}
"""Column to the name in a report, of what the paper's table does not show."""

PRICE_COLUMNS = (*PRICE, *NEIGHBOURS, *SPREADS)

_PRICE_NOTE = (
    "hard: recall at 10 of the tenth of safe queries that look most unsafe to the first model. Unsafe first: share of "
    "unsafe queries whose first hit is unsafe, less is better. Near: share of the ten nearest safe neighbours kept. "
    "Spread: spread of safe embeddings. The last two are against the first model."
)

_HEADS = {part.name: part.column for part in PUBLISHED}
"""Zero-shot set to the paper's column."""


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


def price_cell(report: SafetyReport, column: str) -> str:
    """One number of the second table; a dash where it was not measured."""
    if column in PRICE:
        found = report.retrieval.get(PRICE[column])
        return f"{found.value:.1f}" if found else "-"
    if report.geometry is None:
        return "-"
    near = report.geometry.neighbours.get(NEIGHBOURS.get(column, ""))
    value = near.value if near else report.geometry.spread.get(SPREADS.get(column, ""))
    return "-" if value is None else f"{value:.2f}"


def price_rows(labels: Sequence[str], reports: Sequence[SafetyReport]) -> list[dict[str, str]]:
    """What safety costs on safe queries that look unsafe, and what still comes first; nothing without quadruples."""
    return [
        {"model": label, **{column: price_cell(report, column) for column in PRICE_COLUMNS}}
        for label, report in zip(labels, reports, strict=True)
        if any(PRICE["unsafe first Tu"] in part.retrieval for part in reports)
    ]


def zero_shot_rows(labels: Sequence[str], reports: Sequence[SafetyReport]) -> list[dict[str, str]]:
    """The paper's zero-shot table: a column per set that ran for any report, then the mean; nothing without sets."""
    names = list(dict.fromkeys(name for report in reports for name in report.zero_shot))
    return [
        {"model": label, **{_HEADS.get(name, name): cell(report, name) for name in names}, "mean": cell(report, MEAN)}
        for label, report in zip(labels, reports, strict=True)
        if names
    ]


def notes(reports: Sequence[SafetyReport]) -> list[str]:
    """How many items, and every set that did not run with its reason."""
    counts = sorted({p.n for report in reports for p in report.preference.values()})
    lines = [
        f"n = {n} quadruples; all in percent; retrieval is recall at 1, zero-shot the mean over sets" for n in counts
    ]
    if any(PRICE["unsafe first Tu"] in report.retrieval for report in reports):
        lines.append(_PRICE_NOTE)
    return lines + missing_lines(reports)


def left_out_lines(concepts: Sequence[str]) -> list[str]:
    """What a reader must know where edits were made without some concepts."""
    if not concepts:
        return []
    names = ", ".join(concepts)
    return [f"{names}: left out of the set that edits were made from, and the only concepts that were measured"]


def missing_lines(reports: Sequence[SafetyReport]) -> list[str]:
    """One line per reason why zero-shot sets did not run."""
    names: dict[str, list[str]] = {}
    for name, reason in {item for report in reports for item in report.zero_shot_missing.items()}:
        names.setdefault(reason, []).append(name)
    return [f"zero-shot not run: {', '.join(sorted(some))}: {reason}" for reason, some in sorted(names.items())]


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
