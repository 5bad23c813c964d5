"""A published table next to what was measured here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from uwm_deploy.errors import ExitCode


class Agreement(StrEnum):
    """What a measured number says about a published one."""

    WITHIN = "within"
    OUTSIDE = "outside"
    NOT_COMPARABLE = "not comparable"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproducedNumber:
    """One number.

    Attributes:
        measured: Percent; None when it was not measured.
        low: Lower end of the 95% interval of the measured value, where it has one.
        n: Items; for the zero-shot mean the sets in it.
        result: Agreement.
        reason: Why it was not run, or cannot be compared.
    """

    column: str
    published: float | None
    tolerance: float | None
    measured: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    result: Agreement
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproducedRow:
    """One row; without cells it was not run.

    Attributes:
        reason: Why not.
        fix: What would let it run.
    """

    label: str
    model: str
    method: str
    cells: tuple[ReproducedNumber, ...]
    reason: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """A published table next to what was measured."""

    table: str
    title: str
    source: str
    note: str
    rows: tuple[ReproducedRow, ...]

    @property
    def exit_code(self) -> ExitCode:
        """0 when all that ran agrees, 3 when something does not, 6 when nothing could run."""
        cells = [cell for row in self.rows for cell in row.cells]
        if any(cell.result is Agreement.OUTSIDE for cell in cells):
            return ExitCode.GATE_FAILED
        return ExitCode.PASS if any(cell.measured is not None for cell in cells) else ExitCode.ENVIRONMENT
