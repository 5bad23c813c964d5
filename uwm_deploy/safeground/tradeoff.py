"""Safety gained against knowledge kept: what a sweep is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence

from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.records.studies import SweepPoint

PICKED_METRIC = "GS"
"""Metric that a sweep picks its point by."""


def gain(original: SafetyReport, point: SweepPoint) -> float:
    """Points of GS that an edit adds."""
    return point.safety.preference[PICKED_METRIC].value - original.preference[PICKED_METRIC].value


def zero_shot_mean(report: SafetyReport) -> float:
    """Mean top-1 over the zero-shot sets, percent; NaN without any."""
    values = [p.value for p in report.zero_shot.values()]
    return sum(values) / len(values) if values else math.nan


def mean_recall(report: SafetyReport) -> float:
    """Safe retrieval at 1, percent, mean of both directions."""
    return sum(report.retrieval[f"safe-{way}@1"].value for way in ("text-to-image", "image-to-text")) / 2


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points that no other beats in both coordinates (higher is better), by first coordinate."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    front, best = [], -math.inf
    for i in order:
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front[::-1]
