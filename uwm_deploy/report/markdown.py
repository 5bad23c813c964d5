"""Markdown for a pull request's comment and for the step summary of GitHub."""

from __future__ import annotations

from collections.abc import Sequence

from uwm_deploy.records.verdict import Check, Verdict
from uwm_deploy.report.findings import (
    cause_line,
    findings,
    gap_text,
    limit_text,
    measured_text,
    name_of,
    safer_line,
    variants_by_word,
    verdict_line,
    waiver_line,
)

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
    lines = [f"### {_cell(verdict_line(verdict))}", "", f"**{_cell(_capital(safer_line(verdict)))}**", ""]
    lines += _list("Cause, the first first", [cause_line(blame) for blame in verdict.causes])
    lines += _table(found[:_ROWS])
    if len(found) > _ROWS:
        lines += [f"... and {len(found) - _ROWS} more", ""]
    lines += _list("Try", dict.fromkeys(f"{c.subject}: {name_of(c)}: {c.advice}" for c in found[:_ROWS] if c.advice))
    if verdict.worst:
        lines += [
            "**Worst quadruples**",
            "",
            "| subject | id | concept | decision | margin | was |",
            "|---|---|---|---|---:|---:|",
        ]
        lines += [
            f"| {_cell(w.subject)} | `{_cell(w.id)}` | {_cell(w.concept)} | {w.metric}{' (lost)' if w.lost else ''} "
            f"| {w.margin:+.4f} | {w.reference_margin:+.4f} |"
            for w in verdict.worst
        ]
        lines.append("")
    lines += _list("Waivers", [waiver_line(waiver) for waiver in verdict.waivers])
    lines += _list("Notes", verdict.notes)
    for word, names in variants_by_word(verdict).items():
        lines += [f"{_capital(word)}: {', '.join(_cell(name) for name in names)}", ""]
    lines += [f"<details><summary>All {len(verdict.checks)} checks</summary>", ""]
    lines += [*_table(list(verdict.checks)), "</details>", ""]
    lines.append(f"policy `{verdict.policy_digest[:19]}`, report `{verdict.report_digest[:19]}`")
    return _cut("\n".join(lines) + "\n", limit_bytes)


def _table(checks: Sequence[Check]) -> list[str]:
    if not checks:
        return []
    rows = [f"| {' | '.join(_cell(cell) for cell in _cells(check))} |" for check in checks]
    return [
        "| result | subject | check | measured | limit | missed by | n |",
        "|---|---|---|---|---|---:|---:|",
        *rows,
        "",
    ]


def _cells(check: Check) -> tuple[str, ...]:
    result = f"{check.result.value}{' (waived)' if check.waiver else ''}"
    gap = gap_text(check) if check.blocks else ""
    numbers = (measured_text(check), limit_text(check), gap, str(check.n or ""))
    return (result, check.subject, name_of(check), *numbers)


def _list(title: str, lines: Sequence[str] | dict[str, None]) -> list[str]:
    return [f"**{title}**", "", *(f"- {_cell(line)}" for line in lines), ""] if lines else []


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cell(text: str) -> str:
    """Text that cannot end its cell, start HTML or mention anybody."""
    for old, new in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "\\|"),
        ("`", "'"),
        ("@", "@\u200b"),
        ("\n", " "),
        ("\r", " "),
    ):
        text = text.replace(old, new)
    return text


def _cut(text: str, limit_bytes: int) -> str:
    data = text.encode()
    if len(data) <= limit_bytes:
        return text
    note = "\n\n... cut: too long for this place; verdict.json has everything\n"
    kept = data[: max(0, limit_bytes - len(note.encode()))].decode(errors="ignore")
    return kept[: kept.rfind("\n")] + note
