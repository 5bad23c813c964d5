"""What the gate decided: what does not pass and what to try, the worst items, then the lines that say the result."""

from __future__ import annotations

from collections.abc import Sequence

from uwm_deploy.records.verdict import Check, Result, Verdict
from uwm_deploy.report.findings import (
    cause_line,
    finding_cells,
    findings,
    line_of,
    safer_line,
    variants_by_word,
    verdict_line,
    waiver_line,
    worst_heading,
    worst_line,
)
from uwm_deploy.report.terminal import print_line, print_lines, print_rows

_STYLE = {Result.PASS: "green", Result.FAIL: "red", Result.INCONCLUSIVE: "yellow", Result.NOT_RUN: "yellow"}


def print_verdict(verdict: Verdict) -> None:
    """The verdict line comes last but for the variants, so that it is on the screen whatever was found."""
    found = findings(verdict)
    for blame in verdict.causes:
        print_line(f"cause: {cause_line(blame)}", style="bold red")
    styles = {result.value: style for result, style in _STYLE.items()}
    print_rows([finding_cells(check) for check in found], names=3, styles=styles)
    _print_advice(found)
    if verdict.worst:
        print_lines([f"{worst_heading(verdict.worst)}:", *(f"  {worst_line(item)}" for item in verdict.worst)])
    for waiver in verdict.waivers:
        print_line(waiver_line(waiver), style="bold red" if waiver.state == "expired" else "yellow")
    print_lines(f"note: {note}" for note in verdict.notes)
    # A pass that is not shown safer is no plain pass, so its line is not green.
    style = _STYLE[verdict.result] if verdict.safer.shown or verdict.result is not Result.PASS else "yellow"
    print_line(verdict_line(verdict), style=f"bold {style}")
    print_line(safer_line(verdict), style="green" if verdict.safer.shown else style)
    print_lines(f"{word}: {', '.join(names)}" for word, names in variants_by_word(verdict).items())


def _print_advice(found: Sequence[Check]) -> None:
    """Checks that share an advice, then the advice."""
    for advice in dict.fromkeys(check.advice for check in found):
        for check in (check for check in found if check.advice == advice):
            print_line(line_of(check), style=_STYLE[check.result])
        if advice:
            print_line(f"  try: {advice}")
