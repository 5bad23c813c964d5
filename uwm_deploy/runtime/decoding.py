"""Whether a bundle may be served with JPEGs that are decoded at a reduced size."""

from __future__ import annotations

import warnings

from uwm_deploy.errors import EvidenceError
from uwm_deploy.records.verdict import Result, Verdict
from uwm_deploy.runtime.choices import check_choice
from uwm_deploy.runtime.image import Decode


def check_decoding(verdict: Verdict, decode: Decode, name: str, *, allow_unsafe: bool = False) -> None:
    """Refuses scaled decoding that is not proven.

    Args:
        verdict: Of the bundle.
        decode: What is asked for.
        name: Of the bundle.
        allow_unsafe: Serve it without proof; it warns, each time.

    Raises:
        EvidenceError: If it is not proven.
        InputError: If `decode` is no such choice.
    """
    check_choice(decode, Decode, "decode")
    if decode == "full" or verdict.scaled_decoding is Result.PASS:
        return
    if allow_unsafe:
        warnings.warn(f"UNSAFE OVERRIDE: scaled decoding of {name} without proof", stacklevel=3)
        return
    raise EvidenceError(
        f"bundle {name} does not prove scaled decoding: {reason_unproven(verdict)}",
        fix="leave decode out, or build with an evaluation set of large JPEGs",
    )


def reason_unproven(verdict: Verdict) -> str:
    """Why scaled decoding is not proven, in words; empty where it is."""
    worst = verdict.scaled_decoding
    if worst is Result.PASS:
        return ""
    first = next((check for check in verdict.decoding if check.result is worst), None)
    if first is None:
        return "it was not run"
    return f"{worst.value}, {first.name}: {first.detail}"
