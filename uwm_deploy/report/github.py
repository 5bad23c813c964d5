"""Annotations of GitHub Actions, and the files that a step can write."""

from __future__ import annotations

from collections.abc import Mapping

from uwm_deploy.errors import LONGEST_LINE, visible
from uwm_deploy.records.verdict import Check, Result, Verdict
from uwm_deploy.report.findings import findings, name_of, result_words, safer_line, verdict_line

ANNOTATIONS = 10
"""Errors, and warnings, that one step may have; GitHub drops the others without a word."""


def annotations_from_verdict(verdict: Verdict, *, policy_file: str, lines: Mapping[str, int]) -> list[str]:
    """Workflow commands, the worst first: an error per check that fails or was not run, a warning per other finding.

    A check with too few items, or with a waiver, is a warning: it shows no fault.

    A pass of an edit that is not shown safer is a warning of its own, since no check says so.

    Args:
        verdict: What was decided.
        policy_file: Path of the policy in the repository.
        lines: Rule to its line in that file.
    """
    found = findings(verdict)
    errors = [check for check in found if check.blocks and check.result is not Result.INCONCLUSIVE]
    commands = [_command("error", c, policy_file, lines) for c in _first(errors)]
    notes = [_command("warning", c, policy_file, lines) for c in found if c not in errors]
    if verdict.result is Result.PASS and not verdict.safer.shown:
        text = f"{result_words(verdict)}: {verdict.safer.reason}"
        notes.insert(0, f"::warning file={_property(policy_file)},line=1,title=gate::{_data(text)}")
    commands += notes[:ANNOTATIONS]
    if len(errors) > ANNOTATIONS:
        commands.append(
            f"::error title=gate::{_data(f'{len(errors) - ANNOTATIONS + 1} more; {verdict_line(verdict)}')}"
        )
    return commands


def outputs_from_verdict(verdict: Verdict) -> str:
    """Lines for the file named by `GITHUB_OUTPUT`."""
    values = {
        "verdict": verdict.result.value,
        "safer": str(verdict.safer.shown).lower(),
        "safer-line": safer_line(verdict),
        "faithful": ",".join(verdict.faithful),
        "proven": ",".join(verdict.proven),
        "failed": ",".join(verdict.failed),
        "inconclusive": ",".join(verdict.inconclusive),
        "unproven": ",".join(verdict.unproven),
        "report-digest": verdict.report_digest,
    }
    return "".join(f"{name}={' '.join(value.split())}\n" for name, value in values.items())


def _first(errors: list[Check]) -> list[Check]:
    """As many as fit, with room for the line that counts the others."""
    return errors if len(errors) <= ANNOTATIONS else errors[: ANNOTATIONS - 1]


def _command(kind: str, check: Check, policy_file: str, lines: Mapping[str, int]) -> str:
    place = f"file={_property(policy_file)},line={lines.get(check.rule, 1)},"
    title = _property(f"{check.subject}: {name_of(check)}")
    advice = f" Try: {check.advice}" if check.advice else ""
    return f"::{kind} {place}title={title}::{_data(f'{check.result.value}: {check.detail}{advice}')}"


def _data(text: str) -> str:
    return visible(text, LONGEST_LINE).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
