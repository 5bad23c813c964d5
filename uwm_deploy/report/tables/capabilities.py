"""What `doctor` shows."""

from __future__ import annotations

from collections.abc import Sequence

from uwm_deploy.report.doctor import Capability


def capability_rows(found: Sequence[Capability]) -> list[dict[str, str]]:
    """One row per thing that this machine may have or do."""
    return [{"what": one.what, "ok": "yes" if one.ok else "no", "detail": one.detail} for one in found]
