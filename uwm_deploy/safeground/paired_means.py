"""Means of scores per item, and of paired differences, with their intervals."""

from __future__ import annotations

import math

import numpy as np

from uwm_deploy.errors import DataError
from uwm_deploy.records.metrics import Estimate
from uwm_deploy.safeground.interval import Z95


def mean_of_scores(scores: np.ndarray, clusters: int | None = None) -> Estimate:
    """Mean of scores from 0 to 100 with its 95% interval.

    Args:
        scores: (n,) float64, one score per item.
        clusters: Independent items among them, from which the interval is; all when None.

    Raises:
        DataError: For n = 0, or a score that is not finite: no data is never a number.
    """
    return _mean(scores, 0.0, clusters)


def mean_change(reference: np.ndarray, candidate: np.ndarray, clusters: int | None = None) -> Estimate:
    """Mean of the paired differences of scores from 0 to 100, candidate minus reference.

    Args:
        reference: (n,) float64, one score per item.
        candidate: (n,) float64, of the same items.
        clusters: See `mean_of_scores`.

    Raises:
        DataError: If there are no items, or the two do not match.
    """
    if reference.shape != candidate.shape:
        raise DataError(f"scores of {len(reference)} and {len(candidate)} items cannot be paired", fix="measure again")
    return _mean(candidate - reference, -100.0, clusters)


def _mean(values: np.ndarray, lowest: float, clusters: int | None) -> Estimate:
    """Half an item is added at either end of the range, as `interval.mean_flips` does: no spread is seen is not none."""
    n = len(values)
    if n == 0 or not np.isfinite(values).all():
        raise DataError("a mean of no scores was asked for", fix="measure at least one item")
    k, mean = clusters or n, float(values.mean())
    squares = float(((values - mean) ** 2).sum()) * k / n + ((mean - lowest) ** 2 + (100.0 - mean) ** 2) / 2
    half = Z95 * math.sqrt(squares) / (k + 2)
    return Estimate(value=mean, n=k, low=max(lowest, mean - half), high=min(100.0, mean + half))
