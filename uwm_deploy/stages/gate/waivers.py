"""Waivers: checks that are known not to pass and, until a day, do not block."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Literal

from uwm_deploy.recipes.policy import Waiver
from uwm_deploy.records.verdict import Check, Result, WaiverState


def waiver_of(found: Check, waivers: Sequence[Waiver], today: date) -> WaiverState | None:
    """The waiver that a check does not block by; None when it passes or there is none that is still good."""
    if found.result is Result.PASS:
        return None
    waiver = next((w for w in waivers if _covers(w, found) and w.expires >= today), None)
    return _state(waiver, "applied") if waiver else None


def states_of(waivers: Sequence[Waiver], checks: Sequence[Check], today: date) -> tuple[WaiverState, ...]:
    """Every waiver with what became of it."""
    states = []
    for waiver in waivers:
        applied = any(c.waiver is not None and _covers(waiver, c) for c in checks)
        good = waiver.expires >= today
        states.append(_state(waiver, "expired" if not good else "applied" if applied else "unused"))
    return tuple(states)


def _state(waiver: Waiver, state: Literal["applied", "unused", "expired"]) -> WaiverState:
    return WaiverState(
        check=f"{waiver.check} ({waiver.concept})" if waiver.concept else waiver.check,
        subject=waiver.subject,
        owner=waiver.owner,
        reason=waiver.reason,
        expires=waiver.expires.isoformat(),
        state=state,
    )


def _covers(waiver: Waiver, found: Check) -> bool:
    return (waiver.check, waiver.subject, waiver.concept) == (found.name, found.subject, found.concept)
