"""Means of scores per item, and of paired differences, with their intervals."""

from __future__ import annotations

import math

import numpy as np

from uwm_deploy.errors import DataError
from uwm_deploy.records.metrics import Estimate
from uwm_deploy.safeground.interval import Z95


def mean_of_scores(scores: np.ndarray, clusters: int | None = None) -> Estimate:
    """Mean with its 95% interval, from the spread between items.

    Args:
        scores: (n,) float64, one score per item.
        clusters: Independent items among them, from which the interval is; all when None.

    Raises:
        DataError: For n = 0, or a score that is not finite: no data is never a number.
    """
    n = len(scores)
    if n == 0 or not np.isfinite(scores).all():
        raise DataError("a mean of no scores was asked for", fix="measure at least one item")
    mean = float(scores.mean())
    spread = float(scores.std(ddof=1)) if n > 1 else math.inf
    half = Z95 * spread / math.sqrt(clusters or n)
    if math.isinf(half):
        half = max(100.0, abs(mean))  # one item says nothing of the spread
    return Estimate(value=mean, n=clusters or n, low=mean - half, high=mean + half)


def mean_change(reference: np.ndarray, candidate: np.ndarray, clusters: int | None = None) -> Estimate:
    """Mean of the paired differences, candidate minus reference.

    Args:
        reference: (n,) float64, one score per item.
        candidate: (n,) float64, of the same items.
        clusters: See `mean_of_scores`.

    Raises:
        DataError: If there are no items, or the two do not match.
    """
    if reference.shape != candidate.shape:
        raise DataError(f"scores of {len(reference)} and {len(candidate)} items cannot be paired", fix="measure again")
    return mean_of_scores(candidate - reference, clusters)
