"""The safe items that look most unsafe to a model, by a linear score; no labels are needed (safety-axis.md section 8)."""

from __future__ import annotations

import math

import numpy as np

SHARE = 0.1
"""Of the items that count as hard."""

FOLDS = 5
FEWEST = 10
"""With fewer items there is no such score."""

_RIDGE = 1e-2
_NOTHING = 1e-12
"""Variance, or squared distance of two means, that is no more than rounding of float32 embeddings of length 1."""


def hard_rows(
    safe_image: np.ndarray, unsafe_image: np.ndarray, safe_text: np.ndarray, unsafe_text: np.ndarray
) -> np.ndarray | None:
    """The tenth of the items whose safe members look most unsafe, images and texts together.

    Args:
        safe_image: (n, d), any floating dtype, rows of length 1.
        unsafe_image: (n, d), any floating dtype, rows of length 1.
        safe_text: (n, d), any floating dtype, rows of length 1.
        unsafe_text: (n, d), any floating dtype, rows of length 1.

    Returns:
        (h,) int64 rows, h = ceil(n / 10), the most unsafe-looking first, ties by position; None where a tower has no score:
        fewer than 10 items, safe items that are all alike, or no difference between the mean safe and the mean unsafe item.
    """
    image, text = safe_looks(safe_image, unsafe_image), safe_looks(safe_text, unsafe_text)
    if image is None or text is None:
        return None
    order: np.ndarray = np.argsort(image + text, kind="stable")
    return order[: math.ceil(SHARE * len(order))]


def safe_looks(safe: np.ndarray, unsafe: np.ndarray) -> np.ndarray | None:
    """How safe the safe items of one tower look: 0 as the mean safe item, -1 as the mean unsafe one.

    No item is scored by a fit that saw it: the items of each fold, by position modulo 5, are scored by the other four.

    Args:
        safe: (n, d), any floating dtype, rows of length 1.
        unsafe: (n, d), any floating dtype, rows of length 1, of the same quadruples.

    Returns:
        (n,) float64; None where there is nothing to fit.
    """
    if len(safe) < FEWEST:
        return None
    safe, unsafe = safe.astype(np.float64), unsafe.astype(np.float64)
    fold = np.arange(len(safe)) % FOLDS
    found = np.empty(len(safe))
    for held in range(FOLDS):
        fitted = _fit(safe[fold != held], unsafe[fold != held])
        if fitted is None:
            return None
        axis, centre = fitted
        # Row by row, so that equal items have equal scores wherever they lie.
        found[fold == held] = np.einsum("nd,d->n", safe[fold == held] - centre, axis)
    return found


def _fit(safe: np.ndarray, unsafe: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Axis and mean safe item, (d,) each: the linear discriminant with the covariance of the safe items, shrunk."""
    centre = safe.mean(0)
    delta = centre - unsafe.mean(0)
    spread = np.cov(safe, rowvar=False)
    variance = float(np.trace(spread))
    if variance <= _NOTHING or float(delta @ delta) <= _NOTHING:
        return None
    spread[np.diag_indices_from(spread)] += _RIDGE * variance / len(spread)
    solved = np.linalg.solve(spread, delta)
    return solved / (delta @ solved), centre
