"""Embeddings in a bundle's evidence, with which stored embeddings of the same items must agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from uwm_deploy.errors import EvidenceError, IntegrityError
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.embedding_map import EmbeddingMap, Mapper
from uwm_deploy.safeground.embedded import EmbeddedSet
from uwm_deploy.serve.embed.stored import Known

COSINE_MIN = 0.999
"""Below it two embeddings of one item are of two spaces: other weights, preprocessing or tower. Another engine stays above
0.9999, and so does rounding to float16."""

_MAP_COSINE_MIN = 0.9999
"""Of the map on the evidence itself, where both sides are float32."""

_SIDES = ("safe", "unsafe")


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownEmbeddings:
    """Embeddings of the evaluation set by one tower, in PyTorch float32.

    Attributes:
        rows: Item id to its row.
        after: Embeddings of the safe and of the unsafe members after the map, (n, d) float32 each, rows of length 1.
        before: The same before the map, (n, d) float32 each; None where they are not recorded, because an earlier step
            changed the weights.
        cosine_min: Smallest cosine of a stored embedding to the one in `before`.
    """

    rows: dict[str, int]
    after: tuple[np.ndarray, ...]
    before: tuple[np.ndarray, ...] | None = None
    cosine_min: float = COSINE_MIN

    def knows(self, key: str) -> bool:
        """Whether a key is that of an item: its id, or its id with ``/safe`` or ``/unsafe``."""
        return bool(self._members(key))

    def check(self, found: Iterable[Known], map: EmbeddingMap) -> int:
        """Compares stored embeddings, before and after the map, with those in the evidence.

        Args:
            found: Keys for which `knows` is true, and stored embeddings (d,), any floating dtype.
            map: The map that migrates them.

        Returns:
            Number of embeddings that were compared.

        Raises:
            EvidenceError: If one is of another space; it names the key.
        """
        count = 0
        for key, row in found:
            stored = _unit(row)
            made = _unit(map.weight.astype(np.float64) @ stored + map.bias)
            closest = max((self._cosines(made, stored, side, place) for side, place in self._members(key)), key=min)
            for cosine, least, what in zip(closest, (self.cosine_min, COSINE_MIN), ("stored", "migrated"), strict=True):
                if not cosine >= least:
                    raise EvidenceError(
                        f"{key}: its {what} embedding has cosine {cosine:.4f} to the one in the bundle's evidence, at "
                        f"least {least:.4f} is the same space",
                        fix="these are embeddings of another model, preprocessing or tower: embed the items again",
                    )
            count += 1
        return count

    def check_map(self, map: EmbeddingMap) -> None:
        """Whether the map makes the evidence of the edited model from that of the model before it.

        Raises:
            IntegrityError: If not.
        """
        for before, after in zip(self.before or (), self.after, strict=False):
            made, mapper = np.empty_like(before), Mapper(map)
            for start in range(0, len(before), mapper.chunk):
                some = slice(start, start + mapper.chunk)
                bad = mapper(before[some], made[some])
                cosine = float(np.einsum("nd,nd->n", made[some], after[some]).min()) if bad is None else float("nan")
                if not cosine >= _MAP_COSINE_MIN:
                    raise IntegrityError(
                        f"the map of the bundle does not make its evidence (cosine {cosine:.4f})", fix="build again"
                    )

    def _cosines(self, made: np.ndarray, stored: np.ndarray, side: int, place: int) -> tuple[float, float]:
        """Cosine of the stored and of the migrated embedding to one member."""
        before = 1.0 if self.before is None else float(_unit(self.before[side][place]) @ stored)
        return before, float(_unit(self.after[side][place]) @ made)

    def _members(self, key: str) -> list[tuple[int, int]]:
        """Side and row of the members that a key may mean."""
        if key in self.rows:
            return [(side, self.rows[key]) for side in range(len(_SIDES))]
        item, _, side = key.rpartition("/")
        return [(_SIDES.index(side), self.rows[item])] if side in _SIDES and item in self.rows else []


def evidence_of(
    edited: EmbeddedSet, original: EmbeddedSet | None, tower: TowerName, cosine_min: float = COSINE_MIN
) -> KnownEmbeddings:
    """What is recorded of one tower.

    Args:
        edited: By the edited model.
        original: By the model before the map; None where that is not recorded.
        tower: Which one.
        cosine_min: See `KnownEmbeddings`.
    """

    def members(part: EmbeddedSet) -> tuple[np.ndarray, ...]:
        return tuple(getattr(part, f"{side}_{tower.value}") for side in _SIDES)

    return KnownEmbeddings(
        rows={item: row for row, item in enumerate(edited.ids)},
        after=members(edited),
        before=None if original is None else members(original),
        cosine_min=cosine_min,
    )


def _unit(row: np.ndarray) -> np.ndarray:
    """Float64 of length 1; NaN where there is none, which no limit lets pass."""
    with np.errstate(divide="ignore", invalid="ignore"):
        unit: np.ndarray = row.astype(np.float64) / np.linalg.norm(row.astype(np.float64))
    return unit
