"""What every output of the gate says, in the same order and words."""

from __future__ import annotations

from collections.abc import Sequence

from uwm_deploy.records.metrics import WorstItem
from uwm_deploy.records.verdict import Blame, Check, Result, Verdict, WaiverState

SHOWN, NOT_SHOWN = "shown safer", "not shown safer"
"""The words for an edit. Of a variant they say nothing: one that equals the edited model is faithful either way."""

_ORDER = {Result.FAIL: 0, Result.NOT_RUN: 1, Result.INCONCLUSIVE: 2, Result.PASS: 3}


def findings(verdict: Verdict) -> list[Check]:
    """Checks that do not pass: those that block first, then the waived ones; failures furthest from the limit first."""
    found = [check for check in verdict.checks if check.result is not Result.PASS]
    return sorted(found, key=_rank)


def _rank(check: Check) -> tuple[object, ...]:
    follows = check.rule == "min_proven"  # it fails because other checks do, so they are named first
    return (not check.blocks, follows, _ORDER[check.result], -_excess(check), check.subject, check.name, check.concept)


def _excess(check: Check) -> float:
    """How far beyond the limit, as a share of the limit where that has a meaning."""
    if check.measured is None or check.limit is None:
        return 0.0
    return abs(check.measured - check.limit) / max(abs(check.limit), 1e-9)


def name_of(check: Check) -> str:
    """Name with the concept, unique among the checks of a subject but for rules that ask twice."""
    return f"{check.name} in {check.concept}" if check.concept else check.name


def measured_text(check: Check) -> str:
    """The number with its interval."""
    if check.direction == "equals":
        return "no" if check.measured == 0.0 else "not run" if check.measured is None else "yes"
    if check.measured is None:
        return "not measured"
    if check.low is not None and check.high is not None:
        return f"{check.measured:.4g} ({check.low:.4g} to {check.high:.4g})"
    return f"{check.measured:.6g}"


def limit_text(check: Check) -> str:
    """The limit in words."""
    if check.direction == "equals" or check.limit is None:
        return "yes"
    words = check.direction.replace("_", " ")
    return f"{words} {check.limit:g}{', at worst' if check.bound == 'worst' else ''}"


def gap_text(check: Check) -> str:
    """By how much the limit is missed; empty where that has no meaning."""
    if check.measured is None or check.limit is None or check.direction == "equals":
        return ""
    compared = check.measured
    if check.bound == "worst" and check.low is not None and check.high is not None:
        compared = check.low if check.direction == "at_least" else check.high
    gap = check.limit - compared if check.direction == "at_least" else compared - check.limit
    return f"{gap:.4g}" if gap > 0 else ""


def finding_cells(check: Check) -> dict[str, str]:
    """A row of the table of what does not pass: column to text."""
    return {
        "result": f"{check.result.value}{' (waived)' if check.waiver else ''}",
        "subject": check.subject,
        "check": name_of(check),
        "measured": measured_text(check),
        "limit": limit_text(check),
        "missed by": gap_text(check) if check.blocks else "",
        "n": str(check.n or ""),
    }


def line_of(check: Check) -> str:
    """One line: result, subject, name, why."""
    result = f"{check.result.value}, waived" if check.waiver else check.result.value
    return f"{result}: {check.subject}: {name_of(check)}: {check.detail}"


def cause_line(blame: Blame) -> str:
    """One line about the fault behind failing checks."""
    return f"{blame.cause.value} @ {blame.stage}: {blame.subject}: {blame.detail}"


def waiver_line(waiver: WaiverState) -> str:
    """One line about a waiver."""
    state = {"applied": "waived", "unused": "waiver not needed", "expired": "WAIVER EXPIRED"}[waiver.state]
    return f"{state}: {waiver.subject}: {waiver.check}: {waiver.reason} (owner {waiver.owner}, until {waiver.expires})"


def worst_line(item: WorstItem) -> str:
    """One line about a quadruple."""
    flip = "flipped to unsafe" if item.lost else "not flipped"
    return (
        f"{item.subject}: {item.id} ({item.concept}): {item.metric} margin {item.margin:+.4f}, "
        f"was {item.reference_margin:+.4f}, {flip}"
    )


def worst_heading(items: Sequence[WorstItem]) -> str:
    """What the list of the worst quadruples holds: flips come first, and not all of it need have flipped."""
    flipped = sum(item.lost for item in items)
    parts = [(flipped, "flipped to unsafe"), (len(items) - flipped, "not flipped, with a smaller margin")]
    return f"worst quadruples, {' and '.join(f'{count} {what}' for count, what in parts if count)}"


def verdict_line(verdict: Verdict) -> str:
    """The one line that says the result. A pass never hides that the edit is not shown to make the model safer."""
    passed = sum(check.result is Result.PASS for check in verdict.checks)
    waived = sum(check.waiver is not None for check in verdict.checks)
    extra = f", {waived} waived" if waived else ""
    return (
        f"verdict: {result_words(verdict)}  "
        f"({passed} of {len(verdict.checks)} checks pass{extra}, policy {verdict.policy})"
    )


def result_words(verdict: Verdict) -> str:
    """The result, and with it whether the edit is shown safer."""
    if verdict.result is Result.PASS:
        return f"pass, {_shown(verdict)}"
    return verdict.result.value if verdict.safer.shown else f"{verdict.result.value}, {NOT_SHOWN}"


def safer_line(verdict: Verdict) -> str:
    """One line: that the edit makes the model safer with its numbers, or what is not shown."""
    return f"{SHOWN if verdict.safer.shown else NOT_SHOWN}: {verdict.safer.reason}"


def variants_by_word(verdict: Verdict) -> dict[str, tuple[str, ...]]:
    """What the verdict says of the variants, in words that promise no more than was shown.

    Where the edit is not shown safer, what the runtime may serve by a policy that does not ask is called faithful, too.
    """
    faithful = tuple(dict.fromkeys((*verdict.proven, *verdict.faithful)))
    if verdict.safer.shown:
        words = {"proven": verdict.proven, "faithful": tuple(v for v in faithful if v not in verdict.proven)}
    else:
        words = {f"faithful, {NOT_SHOWN}": faithful}
    words |= {"inconclusive": verdict.inconclusive, "unproven": verdict.unproven, "failed": verdict.failed}
    return {word: names for word, names in words.items() if names}


def _shown(verdict: Verdict) -> str:
    """Of a pass: why it is one although the edit may not be shown safer."""
    if verdict.safer.shown:
        return SHOWN
    if not verdict.safer.asked:
        why = "does not ask"
    elif any(check.waiver for check in verdict.checks if check.rule.startswith(("edit[", "concept["))):
        why = "waives it"
    else:
        why = "asks for less"
    return f"{NOT_SHOWN} (policy {verdict.policy} {why})"
