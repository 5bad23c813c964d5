"""What the check of a running server found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from uwm_deploy.records.verdict import Check, Verdict
from uwm_deploy.report.tables.verdict_lines import print_verdict
from uwm_deploy.report.terminal import print_line, print_rows


class ServedCounts(Protocol):
    """What a server counted of one model."""

    @property
    def inferences(self) -> int:
        """Rows that were answered."""

    @property
    def executions(self) -> int:
        """Calls of the model."""

    @property
    def failures(self) -> int:
        """Requests that ended with an error."""

    @property
    def batches(self) -> Mapping[int, int]:
        """Rows per call to the number of such calls."""


class ServedFindings(Protocol):
    """What was found of a server; the verdict is None where it does not serve the bundle."""

    @property
    def server(self) -> str:
        """Name and version."""

    @property
    def url(self) -> str:
        """Address."""

    @property
    def protocol(self) -> str:
        """How it was asked."""

    @property
    def variant(self) -> str:
        """Variant of the bundle that it serves; empty when it is none."""

    @property
    def checks(self) -> Sequence[Check]:
        """Whether it serves the bundle."""

    @property
    def counts(self) -> Mapping[str, ServedCounts]:
        """What the server counted, by model."""

    @property
    def verdict(self) -> Verdict | None:
        """The gate's, on the served path."""

    @property
    def differ(self) -> Mapping[str, int]:
        """Preference metric to the number of decisions unlike the bundle's own evidence."""


def print_served(found: ServedFindings) -> None:
    """Prints every check, what the server counted, and the verdict."""
    print_line(f"{found.server} at {found.url} ({found.protocol}): {found.variant or 'no known variant'}")
    print_rows([_check_row(check) for check in found.checks])
    print_rows([_count_row(name, counts) for name, counts in found.counts.items()])
    if found.verdict is None:
        print_line("FAIL: it does not serve the bundle; SafeGround was not run")
        return
    print_verdict(found.verdict)
    changed = {name: count for name, count in found.differ.items() if count}
    told = ", ".join(f"{name} {count}" for name, count in changed.items()) or "none"
    print_line(f"decisions that differ from the bundle's own evidence: {told}")


def _check_row(check: Check) -> dict[str, str]:
    measured = "" if check.measured is None or check.direction == "equals" else f"{check.measured:.3g}"
    return {
        "check": check.name,
        "model": check.subject,
        "result": check.result.value,
        "measured": measured,
        "detail": check.detail,
    }


def _count_row(name: str, counts: ServedCounts) -> dict[str, object]:
    return {
        "model": name,
        "rows": counts.inferences,
        "calls": counts.executions,
        "failures": counts.failures,
        "largest batch": max(counts.batches, default=0),
    }
