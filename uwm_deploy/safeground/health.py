"""Signs of a fault that no single decision shows: collapsed embeddings, a set whose members do not belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uwm_deploy.records.evidence import DataHealth, Direction
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


_ENOUGH = 4
"""Calibration items of a concept, from which its own way from safe to unsafe is told."""


@dataclass(frozen=True, slots=True)
class Differences:
    """Unsafe less safe embeddings of some calibration items, by the source model.

    Attributes:
        rows: (n, d) float32, n >= 2.
        concepts: n concepts.
    """

    rows: np.ndarray
    concepts: tuple[str, ...]


def data_health(
    original: EmbeddedSet,
    calibrated: Mapping[str, int],
    differences: Mapping[TowerName, Differences] | None = None,
    copies: Mapping[str, Sequence[int]] | None = None,
) -> DataHealth:
    """What the source model says of an evaluation set.

    A set whose members were shuffled, or whose safe and unsafe images changed places, gives numbers as smooth as a good
    one; but there its own partner is no nearer to a member than a stranger, and the shares here are 50%. A set whose safe
    and unsafe columns changed places is as well paired as a good one; that shows against the calibration set only.

    Args:
        original: The set, embedded by the source model.
        calibrated: Concepts of the calibration set, with their number of items.
        differences: Of calibration items, by tower; None where they are not known.
        copies: Rows that repeat an earlier one: of quadruples under an empty name, of zero-shot sets under theirs; None
            where nobody looked.
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
        directions=None
        if differences is None
        else {t.value: _direction(original, t, d) for t, d in differences.items()},
        copies=None
        if copies is None
        else {name: wilson(len(rows), _size(original, name)) for name, rows in copies.items()},
    )


def _size(original: EmbeddedSet, name: str) -> int:
    return len(original.zero_shot[name].labels) if name else len(original.ids)


def _direction(original: EmbeddedSet, tower: TowerName, calibration: Differences) -> Direction:
    rows = getattr(original, f"unsafe_{tower.value}") - getattr(original, f"safe_{tower.value}")
    total, concepts = calibration.rows.sum(axis=0, dtype=np.float64), np.asarray(calibration.concepts)
    sums = {name: calibration.rows[concepts == name].sum(axis=0, dtype=np.float64) for name in set(concepts.tolist())}
    sums = {name: part for name, part in sums.items() if (concepts == name).sum() >= _ENOUGH}
    ways = np.stack([sums.get(concept, total) for concept in original.concepts])
    # An item does not count in the way that it is compared with.
    others = np.stack([sums.get(name, total) for name in calibration.concepts]) - calibration.rows
    return Direction(
        agrees=wilson(int((_dot(rows, ways) > 0).sum()), len(rows)),
        own=wilson(int((_dot(calibration.rows, others) > 0).sum()), len(others)),
        shared=sum(concept in sums for concept in original.concepts),
    )


def _dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.einsum("nd,nd->n", left, right)
    return result
