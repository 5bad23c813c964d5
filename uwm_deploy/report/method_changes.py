"""What a comparison of methods is told against: the first method that was measured."""

from __future__ import annotations

import math

from uwm_deploy.records.studies import ComparedMethod, MethodComparison
from uwm_deploy.safeground.tradeoff import zero_shot_mean


def first_measured(result: MethodComparison) -> ComparedMethod | None:
    """The first row that could run; None where none could."""
    return next((row for row in result.rows if row.safety is not None), None)


def zero_shot_change(base: ComparedMethod | None, row: ComparedMethod) -> float:
    """Points of zero-shot mean that a method adds; NaN where either was not measured, or without zero-shot sets."""
    if base is None or base.safety is None or row.safety is None:
        return math.nan
    return zero_shot_mean(row.safety) - zero_shot_mean(base.safety)
