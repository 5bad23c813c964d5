"""Uncertainty of proportions and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from uwm_deploy.errors import DataError
from uwm_deploy.records.metrics import Flips, Proportion

Z95 = 1.959963984540054
"""A two-sided 95% interval reaches this many standard errors to each side."""

_LISTED_IDS = 50

Groups = Sequence[Sequence[int]]
"""Row numbers of items that are not independent, group by group; a row that is alone is in none."""


def clusters_of(alike: Groups, rows: np.ndarray) -> int:
    """How many independent items there are among some.

    Args:
        alike: Of all items.
        rows: (n,) bool, the items in question.
    """
    repeated = sum(max(0, int(rows[list(group)].sum()) - 1) for group in alike)
    return int(rows.sum()) - repeated


def wilson(successes: int, n: int, ties: int = 0, clusters: int | None = None) -> Proportion:
    """Percentage with its 95% Wilson score interval.

    Args:
        successes: Items that are true.
        n: Items.
        ties: Items that are decided by an exact tie.
        clusters: Independent items among them, from which the interval is; all when None.

    Raises:
        DataError: For n = 0: no data is never a number.
    """
    if n <= 0:
        raise DataError("a proportion of no items was asked for", fix="evaluate at least one item")
    share, z2, k = successes / n, Z95**2, clusters or n
    centre = (share + z2 / (2 * k)) / (1 + z2 / k)
    half = Z95 / (1 + z2 / k) * math.sqrt(share * (1 - share) / k + z2 / (4 * k * k))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Proportion(value=100 * share, n=n, low=100 * low, high=100 * high, ties=ties, clusters=clusters or 0)


def mcnemar_p(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: is one direction of change more frequent than the other?"""
    n, fewer = lost + gained, min(lost, gained)
    if n == 0:
        return 1.0
    # Logarithms: the binomial coefficients of many flips overflow a float.
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewer + 1)
    ]
    top = max(logs)
    return min(1.0, 2 * math.exp(top) * sum(math.exp(value - top) for value in logs))


def flips(reference: np.ndarray, candidate: np.ndarray, ids: Sequence[str], clusters: int | None = None) -> Flips:
    """Compares decisions on the same items.

    The interval of the paired difference is Wald's with the adjustment of Agresti and Min (half an item added to each of
    the four cells), which keeps its coverage when nothing or little flips. Where items hang together, the four cells are
    scaled down to the number of those that do not.

    Args:
        reference: (n,) bool.
        candidate: (n,) bool.
        ids: n item ids.
        clusters: Independent items among them; all when None.

    Raises:
        DataError: If there are no items, or the two do not match.
    """
    n = len(reference)
    if n == 0 or candidate.shape != reference.shape or len(ids) != n:
        raise DataError(f"decisions on {n} and {len(candidate)} items cannot be paired", fix="evaluate the same items")
    lost_at, gained_at = np.flatnonzero(reference & ~candidate), np.flatnonzero(~reference & candidate)
    lost, gained, part = len(lost_at), len(gained_at), (clusters or n) / n
    size, b, c = n * part + 2, gained * part + 0.5, lost * part + 0.5
    centre = (b - c) / size
    half = Z95 * math.sqrt(max(0.0, (b + c) / size - centre**2) / size)
    return Flips(
        n=n,
        lost=lost,
        gained=gained,
        p_value=mcnemar_p(int(lost * part), int(gained * part)),
        delta=100 * (gained - lost) / n,
        delta_low=100 * max(-1.0, centre - half),
        delta_high=100 * min(1.0, centre + half),
        lost_ids=tuple(ids[i] for i in lost_at[:_LISTED_IDS]),
        gained_ids=tuple(ids[i] for i in gained_at[:_LISTED_IDS]),
        clusters=clusters or 0,
    )


def mean_flips(reference: np.ndarray, candidate: np.ndarray, ids: Sequence[str], clusters: int | None = None) -> Flips:
    """Compares the mean of several decisions about each item, on the same items.

    The decisions of one item may depend on each other: the interval is that of the mean over items of the difference of
    an item's means. It has the same adjustment as that of `flips`, and equals it where all decisions of an item agree. The
    p value is the exact sign test of the items whose mean fell and rose.

    Args:
        reference: (k, n) bool.
        candidate: (k, n) bool.
        ids: n item ids.
        clusters: Independent items among them; all when None.

    Raises:
        DataError: If there are no items, or the two do not match.
    """
    n = reference.shape[-1]
    if n == 0 or candidate.shape != reference.shape or len(ids) != n:
        raise DataError(
            f"decisions on {n} and {candidate.shape[-1]} items cannot be paired", fix="evaluate the same items"
        )
    change = candidate.astype(np.float64).mean(0) - reference.astype(np.float64).mean(0)
    lost_at, gained_at = np.flatnonzero(change < 0), np.flatnonzero(change > 0)
    part, total = (clusters or n) / n, float(change.sum())
    size = n * part + 2
    centre = total * part / size
    half = Z95 * math.sqrt(max(0.0, (float((change**2).sum()) * part + 1) / size - centre**2) / size)
    return Flips(
        n=n,
        lost=len(lost_at),
        gained=len(gained_at),
        p_value=mcnemar_p(int(len(lost_at) * part), int(len(gained_at) * part)),
        delta=100 * total / n,
        delta_low=100 * max(-1.0, centre - half),
        delta_high=100 * min(1.0, centre + half),
        lost_ids=tuple(ids[i] for i in lost_at[:_LISTED_IDS]),
        gained_ids=tuple(ids[i] for i in gained_at[:_LISTED_IDS]),
        clusters=clusters or 0,
    )
