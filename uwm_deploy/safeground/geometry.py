"""Neighbourhoods and spread of safe embeddings, compared with the original model's; memory bounded by chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from uwm_deploy.errors import DataError
from uwm_deploy.records.metrics import Estimate, Geometry
from uwm_deploy.safeground.interval import Z95
from uwm_deploy.safeground.similarity import Similar, similarities

NEAREST = 10
"""Neighbours of an item that are compared."""

NEIGHBOURS = ("image-image", "text-text", "text-image")
"""Whose neighbours among whom."""

SPREADS = ("image", "text")
"""Towers."""

_NOTHING = 1e-6
"""Spread that is no more than rounding of float32 embeddings of length 1."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How the safe embeddings of one model lie.

    Attributes:
        nearest: One of `NEIGHBOURS` to (n, 10) int64, the nearest items of every item, by position; empty with fewer than
            11 items.
        spread: Tower to the total variance of its embeddings, 0 to 1.
        n: Items.
    """

    nearest: Mapping[str, np.ndarray]
    spread: Mapping[str, float]
    n: int


def shape_of(safe_image: np.ndarray, safe_text: np.ndarray) -> Shape:
    """Neighbours and spread of one model.

    Args:
        safe_image: (n, d), any floating dtype, rows of length 1.
        safe_text: (n, d), any floating dtype, rows of length 1.
    """
    nearest = {}
    if len(safe_image) > NEAREST:
        nearest = {
            "image-image": nearest_of(safe_image, safe_image, same=True),
            "text-text": nearest_of(safe_text, safe_text, same=True),
            "text-image": nearest_of(safe_text, safe_image, same=False),
        }
    return Shape(nearest, {"image": spread_of(safe_image), "text": spread_of(safe_text)}, len(safe_image))


def geometry(before: Shape, after: Shape) -> Geometry:
    """What became of the original's neighbours and spread.

    A tower that had no spread has no ratio.

    Args:
        before: Of the original model.
        after: Of another model on the same items.

    Raises:
        DataError: If the two are of different numbers of items.
    """
    if before.n != after.n:
        raise DataError("two models were embedded on different items", fix="evaluate both on the same set")
    return Geometry(
        neighbours={name: _overlap(rows, after.nearest[name]) for name, rows in before.nearest.items()},
        spread={tower: after.spread[tower] / value for tower, value in before.spread.items() if value > _NOTHING},
    )


def spread_of(rows: np.ndarray) -> float:
    """Total variance of rows of length 1: 1 less the squared length of their mean.

    Args:
        rows: (n, d), any floating dtype, rows of length 1.
    """
    mean = rows.astype(np.float64).mean(0)
    return max(0.0, 1.0 - float(mean @ mean))


def nearest_of(queries: np.ndarray, candidates: np.ndarray, *, same: bool) -> np.ndarray:
    """The ten nearest candidates of every query; of equally near ones the first.

    Args:
        queries: (n, d), any floating dtype, rows of length 1.
        candidates: (m, d), any floating dtype, rows of length 1; m > 10.
        same: Whether query i is candidate i, which is then none of its own neighbours.

    Returns:
        (n, 10) int64, in ascending order, not by nearness.
    """
    found = np.empty((len(queries), NEAREST), dtype=np.int64)
    for some in similarities(queries, candidates):
        tenth = np.argpartition(_others(some, same=same), -NEAREST, axis=1)[:, -NEAREST]
        several = some.settle(some.values()[np.arange(len(tenth)), tenth]) > 1
        values = _others(some, same=same)
        last = values[np.arange(len(tenth)), tenth][:, None]
        last[several, 0] = np.partition(values[several], -NEAREST, axis=1)[:, -NEAREST]
        chosen = values >= last
        for i in np.flatnonzero(chosen.sum(1) > NEAREST):  # more than fit are equally near
            tied = np.flatnonzero(values[i] == last[i])
            chosen[i, tied[NEAREST - int(chosen[i].sum()) :]] = False
        found[some.rows] = np.nonzero(chosen)[1].reshape(len(values), NEAREST)
    return found


def _others(some: Similar, *, same: bool) -> np.ndarray:
    """Similarities, to itself none."""
    values = some.values().copy()
    if same:
        values[np.arange(len(values)), np.arange(some.rows.start, some.rows.stop)] = -np.inf
    return values


def _overlap(before: np.ndarray, after: np.ndarray) -> Estimate:
    """Mean over items of shared neighbours divided by all neighbours under either model, with a normal 95% interval."""
    shared = (before[:, :, None] == after[:, None, :]).sum((1, 2))
    overlaps = shared / (2 * NEAREST - shared)
    mean, n = float(overlaps.mean()), len(overlaps)
    half = Z95 * float(overlaps.std(ddof=1)) / math.sqrt(n)
    return Estimate(value=mean, n=n, low=max(0.0, mean - half), high=min(1.0, mean + half))
