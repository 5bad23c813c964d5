"""Similarities of many rows to many, the same on every machine wherever a decision depends on them; bounded by chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_CHUNK_ROWS = 512
_PAIR_VALUES = 1 << 22
"""Numbers of either side that are in memory while pairs are settled."""


@dataclass(slots=True)
class Similar:
    """Similarities of some queries to all candidates.

    A matrix product sums in an order that depends on the library, on the number of threads and on the place of a row, so two
    equal candidates are not equally similar. What it gives is good enough to tell which pairs are far from a decision. The
    others are settled: worked out row by row, as preferences are.

    Attributes:
        rows: Which queries.
        queries: (b, d) float64, these queries.
        candidates: (u, d) float64, each candidate once.
        places: (m,) int64, for every candidate the row of `candidates` that it is; None where no two are equal.
        found: (b, u) float64, similarities; settled ones are exact.
    """

    rows: slice
    queries: np.ndarray
    candidates: np.ndarray
    places: np.ndarray | None
    found: np.ndarray

    def values(self) -> np.ndarray:
        """(b, m) float64, not to be changed."""
        return self.found if self.places is None else self.found[:, self.places]

    def settle(self, *around: np.ndarray) -> np.ndarray:
        """Works out exactly what is too near to a number to be told from it.

        Args:
            around: (b,) float64 each, a number of every query.

        Returns:
            (b,) int64, how many different candidates that were.
        """
        near = np.zeros(self.found.shape, dtype=bool)
        tolerance = 4 * self.queries.shape[1] * np.finfo(np.float64).eps
        for numbers in around:
            near |= np.abs(self.found - numbers[:, None]) <= tolerance
        left, right = np.nonzero(near)
        step = max(1, _PAIR_VALUES // self.queries.shape[1])
        for start in range(0, len(left), step):
            some, others = left[start : start + step], right[start : start + step]
            self.found[some, others] = rowwise(self.queries[some], self.candidates[others])
        counts: np.ndarray = near.sum(1)
        return counts


def rowwise(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Similarity of each row to the row of the same number.

    Products of float32 are exact in float64, and every row is summed alike, so equal rows are equally similar.

    Args:
        left: (n, d), any floating dtype.
        right: (n, d), any floating dtype.

    Returns:
        (n,) float64.
    """
    result: np.ndarray = np.einsum("nd,nd->n", left.astype(np.float64), right.astype(np.float64))
    return result


def similarities(queries: np.ndarray, candidates: np.ndarray) -> Iterator[Similar]:
    """Similarities of some queries at a time.

    Args:
        queries: (n, d), any floating dtype, rows of length 1.
        candidates: (m, d), any floating dtype, rows of length 1.
    """
    first: dict[bytes, int] = {}
    places = np.array([first.setdefault(row.tobytes(), len(first)) for row in candidates], dtype=np.int64)
    alone = len(first) == len(candidates)
    each = np.stack([np.frombuffer(row, candidates.dtype) for row in first]).astype(np.float64)
    for start in range(0, len(queries), _CHUNK_ROWS):
        some = queries[start : start + _CHUNK_ROWS].astype(np.float64)
        yield Similar(slice(start, start + len(some)), some, each, None if alone else places, some @ each.T)
