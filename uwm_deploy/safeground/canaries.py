"""Differential canaries: inputs where the edited and the original model differ most, which an artifact must not confuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from uwm_deploy.errors import DataError, IntegrityError

CANARIES = 16
"""Inputs per tower."""

RATIO_LIMIT = 0.5
"""Distance to the edited model divided by distance to the original one; above it the artifact may be the wrong model."""


FAR = 1e9
"""A row at the original model, or without a direction."""


@dataclass(frozen=True, slots=True)
class Canaries:
    """Canaries of one tower.

    Attributes:
        inputs: (n, 3, H, W) float32 pixels or (n, L) int64 ids, preprocessed.
        original: (n, d) float32, embeddings of the unedited model, rows of length 1.
        edited: (n, d) float32, embeddings of the edited model, rows of length 1.
    """

    inputs: np.ndarray
    original: np.ndarray
    edited: np.ndarray

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], name: str) -> Canaries:
        """Canaries of a file's arrays.

        Args:
            tensors: By name; any shape and dtype, which is checked.
            name: Of the file, for messages.

        Raises:
            IntegrityError: If they are other arrays, or of other shapes.
        """
        if set(tensors) != {"inputs", "original", "edited"}:
            raise IntegrityError(f"{name} holds other tensors: {', '.join(sorted(tensors))[:200]}", fix="build again")
        found = cls(**tensors)
        shapes = [len(part.shape) for part in (found.inputs, found.original, found.edited)]
        rows = {part.shape[:1] for part in (found.inputs, found.original, found.edited)}
        floats = all(part.dtype == np.float32 for part in (found.original, found.edited))
        same = len(rows) == 1 and found.original.shape == found.edited.shape
        if shapes not in ([2, 2, 2], [4, 2, 2]) or not same or not floats:
            raise IntegrityError(f"{name} contradicts itself: its tensors do not belong together", fix="build again")
        return found

    def worst(self, found: np.ndarray) -> float:
        """Largest of the `ratios` of an artifact's embeddings; `FAR` if it is infinite, since reports hold numbers.

        Args:
            found: (n, d), any floating dtype, the artifact's embeddings of `inputs`, rows of length 1.
        """
        return min(float(ratios(found, self.original, self.edited).max()), FAR)


def choose(original: np.ndarray, edited: np.ndarray, count: int = CANARIES) -> np.ndarray:
    """Rows, at most `count`, in which two models differ most.

    Args:
        original: (n, d), any floating dtype, embeddings of the unedited model, rows of length 1.
        edited: (n, d), any floating dtype, embeddings of the edited model, rows of length 1.
        count: Largest number of rows.

    Returns:
        (k,) int64, k <= count, the row with the largest difference first; rows without a difference are left out.
    """
    distance = _distance(original, edited)
    order = np.argsort(-distance, kind="stable")[:count]
    return order[distance[order] > 0]


def ratios(found: np.ndarray, original: np.ndarray, edited: np.ndarray) -> np.ndarray:
    """Distance of each row to the edited model, divided by its distance to the original one.

    Args:
        found: (n, d), any floating dtype, an artifact's embeddings, rows of length 1.
        original: (n, d), any floating dtype, embeddings of the unedited model, rows of length 1.
        edited: (n, d), any floating dtype, embeddings of the edited model, rows of length 1.

    Returns:
        (n,) float64; infinite for a row that equals the original's or is not finite.

    Raises:
        DataError: If the shapes differ, or the two models do not differ in a row.
    """
    if not found.shape == original.shape == edited.shape:
        raise DataError(f"canaries have shapes {found.shape}, {original.shape}, {edited.shape}", fix="build again")
    if not len(found) or bool((_distance(original, edited) == 0).any()):
        raise DataError("a canary does not tell the two models apart", fix="build again")
    to_edited, to_original = _distance(found, edited), _distance(found, original)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.where(to_original > 0, to_edited / to_original, np.inf)
    return np.where(np.isfinite(found).all(axis=1), quotient, np.inf)


def _distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Distance of unit vectors; a row with NaN or without length is far from everything."""
    distance: np.ndarray = np.nan_to_num(np.linalg.norm(_unit(left) - _unit(right), axis=1), nan=np.inf)
    return distance


def _unit(rows: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        result: np.ndarray = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return result
