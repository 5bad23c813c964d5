"""Numbers with their 95% interval, in one line of text."""

from __future__ import annotations

from uwm_deploy.records.metrics import Flips, Proportion


def share_text(share: Proportion) -> str:
    """Percent, such as ``71.3 (68.4 to 74.0)``."""
    return f"{share.value:.1f} ({share.low:.1f} to {share.high:.1f})"


def change_text(change: Flips) -> str:
    """Points with their sign, such as ``+0.8 (-0.6 to +2.3)``."""
    return f"{change.delta:+.1f} ({change.delta_low:+.1f} to {change.delta_high:+.1f})"
