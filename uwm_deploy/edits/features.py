"""Features that the calibration pass keeps for the choice of a strength, and the folds that hold items out of a fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uwm_deploy.errors import DataError
from uwm_deploy.records.model import TowerName

FOLDS = 4
"""Number of folds of each kind."""

FEWEST = 20
"""Smallest number of items to choose a strength by: the folds of fewer are too small to measure anything."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TowerFeatures:
    """Features of the kept items in one tower.

    Attributes:
        safe: (n, m) float32, pooled features of the model that is edited; row i of every array is item i.
        unsafe: (n, m) float32, the same of the unsafe members.
        weight: (d, m) float64, the last linear map of that model.
        original_safe: (n, d) float32, embeddings of the model before any step, rows of length 1.
        original_unsafe: (n, d) float32, the same of the unsafe members.
    """

    safe: np.ndarray
    unsafe: np.ndarray
    weight: np.ndarray
    original_safe: np.ndarray
    original_unsafe: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ZeroShotFeatures:
    """Features of one zero-shot set.

    Attributes:
        images: (n, m) float32, pooled features of the model that is edited.
        labels: (n,) int64, rows of `classes`.
        classes: (c, m) float32, pooled features, one prompt per class.
        original_images: (n, d) float32, embeddings of the model before any step, rows of length 1.
        original_classes: (c, d) float32, the same of the prompts.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    original_images: np.ndarray
    original_classes: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeptFeatures:
    """Features that a strength is chosen from.

    Attributes:
        ids: Ids of the items.
        concepts: Concept of each item.
        towers: Features per tower.
        zero_shot: Features by name of the zero-shot set; empty when zero-shot is not measured.
    """

    ids: tuple[str, ...]
    concepts: tuple[str, ...]
    towers: Mapping[TowerName, TowerFeatures]
    zero_shot: Mapping[str, ZeroShotFeatures]

    def require_whole(self) -> None:
        """Refuses features that do not belong together.

        Raises:
            DataError: If there are too few items, rows are missing, or a value is not finite.
        """
        n = len(self.ids)
        if n < FEWEST:
            raise DataError(
                f"{n} items are too few to choose a strength by", fix=f"give at least {FEWEST}, or an axis setting"
            )
        rows: dict[str, np.ndarray] = {}
        for tower, features in self.towers.items():
            rows |= {f"{tower} {name}": getattr(features, name) for name in TowerFeatures.__slots__ if name != "weight"}
        lengths = {name: len(array) for name, array in rows.items()} | {"concepts": len(self.concepts)}
        for name, length in lengths.items():
            if length != n:
                raise DataError(f"{name} has {length} rows for {n} items", fix="keep whole quadruples")
        for name, part in self.zero_shot.items():
            rows |= {f"zero-shot {name} {field}": getattr(part, field) for field in ZeroShotFeatures.__slots__}
        for name, array in rows.items():
            if not np.isfinite(array).all():
                raise DataError(f"{name} holds NaN or infinity", fix="leave such items out, by name, first")


def random_folds(n: int, seed: int) -> list[np.ndarray]:
    """Rows that each fold holds out, (n / 4,) int64 up to rounding, ascending; every row is in one fold."""
    order = np.random.default_rng(seed).permutation(n)
    return [np.sort(order[start::FOLDS]) for start in range(FOLDS)]


def concept_folds(concepts: Sequence[str]) -> list[tuple[str, ...]]:
    """Concepts that each fold leaves out, the larger ones dealt first, each to the fold with the fewest items so far.

    Returns:
        Concepts by fold: as many folds as concepts where there are fewer than four; none for one concept, since nothing
        would be left to fit.
    """
    sizes = Counter(concepts)
    if len(sizes) < 2:
        return []
    folds: list[list[str]] = [[] for _ in range(min(FOLDS, len(sizes)))]
    for concept in sorted(sizes, key=lambda name: (-sizes[name], name)):
        min(folds, key=lambda fold: sum(sizes[name] for name in fold)).append(concept)
    return [tuple(sorted(fold)) for fold in folds]
