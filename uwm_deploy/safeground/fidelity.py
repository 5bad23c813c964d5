"""How far an artifact's embeddings are from the edited model's, over every item, by member and concept.

A few rows say whether an artifact works. Only all of them say whether it works for every concept: one that goes back to the
original model for one concept hides among the rows of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from uwm_deploy.records.evidence import RowParity
from uwm_deploy.safeground.canaries import FAR
from uwm_deploy.safeground.embedded import EmbeddedSet

MEMBERS = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")
"""Of a quadruple."""

_MOVED = 0.05
"""Mean distance of edited from original embeddings, of length 1, from which their difference has a direction to speak of."""


def row_parity(
    reference: EmbeddedSet, candidate: EmbeddedSet, original: EmbeddedSet | None
) -> dict[str, dict[str, RowParity]]:
    """Member to concept to the differences of its rows; images and prompts of the zero-shot sets have no concept.

    Args:
        reference: The edited model.
        candidate: An artifact, on the same items.
        original: The unedited model; without it nothing is said of how much of the edit is undone.
    """
    concepts = np.asarray(reference.concepts, dtype=object)
    found: dict[str, dict[str, RowParity]] = {}
    for member in MEMBERS:
        rows = [getattr(part, member) if part is not None else None for part in (reference, candidate, original)]
        groups = {name: np.flatnonzero(concepts == name) for name in dict.fromkeys(reference.concepts)}
        found[member] = {
            name: _compared(*(part[chosen] if part is not None else None for part in rows))
            for name, chosen in groups.items()
        }
    for name, part in reference.zero_shot.items():
        other, before = candidate.zero_shot[name], original.zero_shot.get(name) if original else None
        for what in ("images", "classes"):
            rows = [getattr(one, what) if one is not None else None for one in (part, other, before)]
            found[f"zero_shot.{name}.{what}"] = {"": _compared(*rows)}
    return found


def _compared(reference: np.ndarray | None, candidate: np.ndarray | None, original: np.ndarray | None) -> RowParity:
    assert reference is not None
    assert candidate is not None
    left, right = reference.astype(np.float64), candidate.astype(np.float64)
    apart = right - left
    # Rows have length 1; this loses fewer digits near 1 than their product does.
    cosine = 1 - np.einsum("nd,nd->n", apart, apart) / 2
    return RowParity(
        n=len(left),
        cosine_min=float(np.clip(cosine, -1, 1).min()),
        max_abs=float(np.abs(apart).max()),
        undone=None if original is None else _undone(apart, original.astype(np.float64) - left),
    )


def _undone(apart: np.ndarray, back: np.ndarray) -> float | None:
    """Share of the way back to the original model; rounding goes in no direction, so its share is near 0."""
    length = float(np.einsum("nd,nd->", back, back))
    if length / len(back) < _MOVED**2:
        return None
    return float(np.einsum("nd,nd->", apart, back) / length)


@dataclass(slots=True)
class Lengths:
    """Watches the lengths of the rows that an encoder gives, before they are divided by them.

    Attributes:
        largest: Largest difference from 1.
    """

    largest: float = field(default=0.0)

    def of(self, encode: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """The same encoder, watched.

        Args:
            encode: From inputs (b, 3, H, W) float32 or (b, L) int64 to embeddings (b, d) float32.

        Returns:
            From the same inputs to the same embeddings, (b, d) float32.
        """

        def watched(inputs: np.ndarray) -> np.ndarray:
            rows = encode(inputs)
            lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
            self.largest = max(self.largest, float(np.nan_to_num(np.abs(lengths - 1), nan=FAR, posinf=FAR).max()))
            return rows

        return watched
