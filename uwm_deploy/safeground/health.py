"""Signs of a fault that no single decision shows: collapsed embeddings, a set whose members do not belong together."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from uwm_deploy.records.evidence import DataHealth
from uwm_deploy.records.model import TowerName
from uwm_deploy.safeground.embedded import EmbeddedSet
from uwm_deploy.safeground.interval import wilson

_TOGETHER = (("safe_text", "safe_image"), ("unsafe_text", "unsafe_image"))
"""Members of one quadruple that describe the same thing."""


def anisotropy(rows: np.ndarray) -> float:
    """Mean cosine of two different rows: near 1 when embeddings have collapsed.

    The sum of all cosines is the squared length of the sum of the rows, so no matrix of n by n is computed.

    Args:
        rows: (n, d), any floating dtype, rows of length 1; n >= 2.
    """
    n = len(rows)
    total = rows.astype(np.float64).sum(axis=0)
    return float((total @ total - n) / (n * (n - 1)))


def anisotropy_change(reference: EmbeddedSet, candidate: EmbeddedSet) -> dict[str, float]:
    """Tower to the anisotropy of a candidate's safe and unsafe embeddings, less the reference's."""
    found = {}
    for tower in TowerName:
        before, after = (
            np.concatenate([getattr(part, f"{side}_{tower.value}") for side in ("safe", "unsafe")])
            for part in (reference, candidate)
        )
        found[tower.value] = anisotropy(after) - anisotropy(before)
    return found


def data_health(original: EmbeddedSet, calibrated: Mapping[str, int]) -> DataHealth:
    """What the source model says of an evaluation set.

    A set whose members were shuffled, or whose safe and unsafe images changed places, gives numbers as smooth as a good
    one; but there its own partner is no nearer to a member than a stranger, and the shares here are 50%.

    Args:
        original: The set, embedded by the source model.
        calibrated: Concepts of the calibration set, with their number of items.
    """
    n = len(original.ids)
    # Sets are often sorted by concept: the farthest item is the least likely to be one of the same kind.
    stranger = (np.arange(n) + n // 2) % n
    paired = {}
    for left, right in _TOGETHER:
        query, rows = getattr(original, left), getattr(original, right)
        paired[f"{left} {right}"] = wilson(int((_dot(query, rows) > _dot(query, rows[stranger])).sum()), n)
    straight = _dot(original.safe_text, original.safe_image) + _dot(original.unsafe_text, original.unsafe_image)
    crossed = _dot(original.safe_text, original.unsafe_image) + _dot(original.unsafe_text, original.safe_image)
    return DataHealth(
        paired=paired,
        aligned=wilson(int((straight > crossed).sum()), n),
        calibrated_concepts=dict(sorted(calibrated.items())),
    )


def _dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.einsum("nd,nd->n", left, right)
    return result
