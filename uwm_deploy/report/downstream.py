"""The part of the page about what came out behind the edited towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from uwm_deploy.records.downstream import DownstreamReport
from uwm_deploy.report.blocks import folded, section, table
from uwm_deploy.report.markup import Child, Html, tag
from uwm_deploy.report.tables.downstream import flagged_rows, heading_of, score_rows, told_lines

_HEADS = {"caption": "Captions behind the edited tower", "draw": "Pictures behind the edited tower"}


def behind(report: DownstreamReport) -> Html:
    """Shares of flagged outputs, what was kept, and how it was measured."""
    told = tag("ul", {}, *(tag("li", {}, line) for line in told_lines(report)))
    scores = folded("What was kept", table(_cells(score_rows(report))))
    return section(
        f"downstream-{report.kind}",
        _HEADS[report.kind],
        f"{heading_of(report)[:1].upper()}{heading_of(report)[1:]}.",
        table(_cells(flagged_rows(report))),
        scores,
        folded("How it was measured", told),
    )


def _cells(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, Child]]:
    return [dict(row) for row in rows]
