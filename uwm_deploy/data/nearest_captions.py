"""The safe caption nearest to every unsafe caption, and its cosine: targets and curriculum of SafeR-CLIP."""

from __future__ import annotations

import numpy as np

from uwm_deploy.safeground.similarity import similarities

STAGES = 3
"""Easy, medium, hard: the first epoch has the easy third, the second two thirds, later ones all."""


def nearest_safe(unsafe: np.ndarray, safe: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The safe caption that is most like each unsafe one, by the frozen text tower; of equals the first.

    Args:
        unsafe: (n, d) float32, embeddings of unsafe captions, rows of length 1.
        safe: (m, d) float32, embeddings of safe captions, rows of length 1.

    Returns:
        (n,) int64, rows of `safe`, and (n,) float32, cosines with these rows.
    """
    rows, cosines = [], []
    for some in similarities(unsafe, safe):
        some.settle(some.values().max(1))
        values = some.values()
        best = values.argmax(1)
        rows.append(best)
        cosines.append(values[np.arange(len(best)), best].astype(np.float32))
    return np.concatenate(rows), np.concatenate(cosines)


def stages_of(cosine: np.ndarray) -> np.ndarray:
    """Stage of each pair: thirds by cosine, the nearest pairs first; of equals the first is easier.

    Args:
        cosine: (n,), any floating dtype.

    Returns:
        (n,) int64, 0, 1 or 2.
    """
    order = np.argsort(-cosine, kind="stable")
    stages = np.empty(len(cosine), dtype=np.int64)
    stages[order] = np.arange(len(cosine)) * STAGES // max(1, len(cosine))
    return stages
