"""Markdown for a pull request's comment and for the step summary of GitHub."""

from __future__ import annotations

from collections.abc import Sequence

from uwm_deploy.records.metrics import WorstItem
from uwm_deploy.records.verdict import Check, Verdict
from uwm_deploy.report.findings import (
    cause_line,
    finding_cells,
    findings,
    name_of,
    safer_line,
    variants_by_word,
    verdict_line,
    waiver_line,
    worst_heading,
)
from uwm_deploy.report.markdown_table import cell_text, code, inert, inline, markdown_of_cells

SUMMARY_BYTES = 1_000_000
"""GitHub drops a step summary above 1 MiB as a whole."""

_ROWS = 50


def markdown_from_verdict(verdict: Verdict, *, limit_bytes: int = SUMMARY_BYTES) -> str:
    """What does not pass first, then the worst items, waivers, notes, and every check folded away.

    Args:
        verdict: What was decided.
        limit_bytes: Largest size; what does not fit is cut at a line, and it says so.
    """
    found = findings(verdict)
    lines = [f"### {_line(verdict_line(verdict))}", "", f"**{_line(_capital(safer_line(verdict)))}**", ""]
    lines += _list("Cause, the first first", [cause_line(blame) for blame in verdict.causes])
    lines += _checks(found[:_ROWS])
    if len(found) > _ROWS:
        lines += [f"... and {len(found) - _ROWS} more", ""]
    lines += _list("Try", dict.fromkeys(f"{c.subject}: {name_of(c)}: {c.advice}" for c in found[:_ROWS] if c.advice))
    lines += _worst(verdict.worst)
    lines += _list("Waivers", [waiver_line(waiver) for waiver in verdict.waivers])
    lines += _list("Notes", verdict.notes)
    for word, names in variants_by_word(verdict).items():
        lines += [f"{_capital(word)}: {', '.join(_line(name) for name in names)}", ""]
    lines += [f"<details><summary>All {len(verdict.checks)} checks</summary>", ""]
    lines += [*_checks(verdict.checks), "</details>", ""]
    lines.append(f"policy `{verdict.policy_digest[:19]}`, report `{verdict.report_digest[:19]}`")
    return _cut("\n".join(lines) + "\n", limit_bytes)


def _checks(checks: Sequence[Check]) -> list[str]:
    """A table of checks and a blank line; nothing without checks."""
    if not checks:
        return []
    cells = [finding_cells(check) for check in checks]
    rows = [[inline(text) for text in row.values()] for row in cells]
    return [markdown_of_cells(list(cells[0]), rows, right=(5, 6), tight=True), ""]


def _worst(items: Sequence[WorstItem]) -> list[str]:
    """A table of the worst quadruples and a blank line; nothing without any."""
    if not items:
        return []
    rows = [
        [
            inline(item.subject),
            code(item.id),
            inline(item.concept),
            item.metric,
            f"{item.margin:+.4f}",
            f"{item.reference_margin:+.4f}",
            "to unsafe" if item.lost else "no",
        ]
        for item in items
    ]
    head = ("subject", "id", "concept", "decision", "margin", "was", "flip")
    return [f"**{_capital(worst_heading(items))}**", "", markdown_of_cells(head, rows, right=(4, 5), tight=True), ""]


def _list(title: str, lines: Sequence[str] | dict[str, None]) -> list[str]:
    return [f"**{title}**", "", *(f"- {_line(line)}" for line in lines), ""] if lines else []


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _line(text: str) -> str:
    """Text outside of a table, on one line."""
    return cell_text(inert(text))


def _cut(text: str, limit_bytes: int) -> str:
    data = text.encode()
    if len(data) <= limit_bytes:
        return text
    note = "\n\n... cut: too long for this place; verdict.json has everything\n"
    kept = data[: max(0, limit_bytes - len(note.encode()))].decode(errors="ignore")
    return kept[: kept.rfind("\n")] + note
