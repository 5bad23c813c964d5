"""An accepted report, and what changed since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from uwm_deploy.records.metrics import Flips
from uwm_deploy.records.model import Digest
from uwm_deploy.records.verdict import Baseline
from uwm_deploy.report.intervals import change_text
from uwm_deploy.report.tables.safety_numbers import print_report
from uwm_deploy.report.terminal import print_line, print_lines, print_rows


class MetricChange(Protocol):
    """One metric of one subject, then and now."""

    @property
    def subject(self) -> str:
        """The edited model, or a variant."""

    @property
    def metric(self) -> str:
        """Its name."""

    @property
    def before(self) -> float:
        """Percentage in the baseline."""

    @property
    def after(self) -> float:
        """Percentage in the report."""

    @property
    def flips(self) -> Flips:
        """Item by item."""


def print_baseline(baseline: Baseline, digest: Digest) -> None:
    """Who accepted what, and its main numbers."""
    report = baseline.report
    print_report(report)
    print_lines(
        [
            f"accepted {baseline.accepted} by {baseline.accepted_by}: {baseline.reason}",
            f"policy     {baseline.policy} {baseline.policy_digest[:19]}",
            f"model      {report.model.name}, edited weights {report.edited_weights_digest}",
            f"measured   on {report.evaluation.name}, {report.evaluation.n} quadruples, content "
            f"{report.evaluation.content_digest[:19]}",
            f"digest     {digest}",
        ]
    )


def print_changes(found: Sequence[MetricChange]) -> None:
    """Then and now, item by item."""
    print_rows(
        [
            {
                "subject": change.subject,
                "metric": change.metric,
                "baseline": f"{change.before:.1f}",
                "now": f"{change.after:.1f}",
                "change": change_text(change.flips),
                "lost": change.flips.lost,
                "gained": change.flips.gained,
                "p": f"{change.flips.p_value:.2g}",
            }
            for change in found
        ],
        group="subject",
    )
    if not found:
        print_line("the two reports have no subject in common")
