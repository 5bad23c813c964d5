"""Judges decoding at a reduced size by the policy's limits on artifacts in 8 bits: it changes numbers, not the model."""

from __future__ import annotations

from collections.abc import Sequence

from uwm_deploy.recipes.policy import Limit
from uwm_deploy.records.evidence import ScaledDecoding
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.verdict import Check, Result, statement
from uwm_deploy.stages.gate.limits import check
from uwm_deploy.stages.gate.measured import decoding_metrics

SUBJECT = "scaled decoding"


def decoding_checks(found: ScaledDecoding | None, limits: Sequence[Limit]) -> tuple[Check, ...]:
    """One check per limit on decisions and cosines; none where nothing was measured, which proves nothing.

    Args:
        found: What was measured.
        limits: Of the policy, on artifacts.
    """
    if found is None:
        return ()
    if not found.reduced:
        return (_not_run(found),)
    metrics = decoding_metrics(found)
    checks = [
        check(SUBJECT, metrics, limit, rule=f"artifact[{number}]")
        for number, limit in enumerate(limits)
        if limit.metric in metrics and (not limit.precision or Precision.INT8 in limit.precision)
    ]
    decided = any(one.name.startswith("flips.") for one in checks)
    return (*checks, statement("limits apply", SUBJECT, decided, "the policy has no limit on flips for 8 bits"))


def decoding_note(found: ScaledDecoding | None, checks: Sequence[Check]) -> list[str]:
    """A line for people where something was measured."""
    if found is None or not found.reduced:
        return []
    worst = next((one for one in checks if one.result is not Result.PASS), None)
    result = "proven" if worst is None else f"{worst.result.value} ({worst.name}: {worst.detail})"
    flips = max((share.lost + share.gained for share in found.flips.values()), default=0)
    return [
        f"{SUBJECT}: {result}; {found.reduced} of {found.images} images reduced, cosine at least {found.cosine_min:.4f}, "
        f"at most {flips} decisions differ"
    ]


def _not_run(found: ScaledDecoding) -> Check:
    return Check(
        name="flips.any",
        subject=SUBJECT,
        result=Result.NOT_RUN,
        measured=None,
        limit=None,
        direction="at_most",
        detail=f"none of {found.images} images is a JPEG large enough to be reduced",
    )
