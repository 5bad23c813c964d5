"""The affine map that ends an edited model of placement `embedding`, in numpy: what it makes of stored embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.bundle.space import weights_before
from uwm_deploy.bundle.tensors import arrays_from
from uwm_deploy.errors import ContractError, IntegrityError
from uwm_deploy.records.edit import MAP_NAMES
from uwm_deploy.records.model import TowerName

LENGTH_TOLERANCE = 1e-3
"""How far from 1 an embedding's length may be; float16 rounds by less than half of this."""

_PATCH = BundleLayout.PATCH


@dataclass(frozen=True, slots=True)
class EmbeddingMap:
    """y to (A y + c) / ||A y + c||, for embeddings y of length 1.

    Attributes:
        weight: A, (d, d) float32.
        bias: c, (d,) float32.

    Raises:
        ContractError: If the shapes do not belong together.
    """

    weight: np.ndarray
    bias: np.ndarray

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.weight.shape != (*self.bias.shape, *self.bias.shape):
            raise ContractError(f"a map of shape {self.weight.shape} has a bias of shape {self.bias.shape}")

    @property
    def dim(self) -> int:
        """Numbers per embedding."""
        return len(self.bias)


class Mapper:
    """Puts rows through a map, a chunk at a time, in buffers that it keeps.

    Args:
        map: The map.
        chunk: Most rows at a time.
    """

    def __init__(self, map: EmbeddingMap, chunk: int = 8192) -> None:
        self.map, self.chunk = map, chunk
        self._weight = np.ascontiguousarray(map.weight.T, dtype=np.float32)
        self._bias = map.bias.astype(np.float32)
        self._unit = np.empty((chunk, map.dim), dtype=np.float32)
        self._made = np.empty((chunk, map.dim), dtype=np.float32)

    def __call__(self, rows: np.ndarray, out: np.ndarray, keep: np.ndarray | None = None) -> int | None:
        """Maps rows, all or none.

        Args:
            rows: (n, d) float32 or float16, n at most the chunk.
            out: (n, d), any floating dtype; may be `rows`.
            keep: (n,) bool: rows that stay as they are, whatever they hold. [default: none]

        Returns:
            The first row that is not finite, is not of length 1, or has no direction after the map; None if all is well.
            Nothing is written if there is one.
        """
        unit, made = self._unit[: len(rows)], self._made[: len(rows)]
        np.copyto(unit, rows)
        if keep is not None:
            unit[keep] = 0.0
        lengths = np.sqrt(np.einsum("nd,nd->n", unit, unit))
        good = np.abs(lengths - 1.0) <= LENGTH_TOLERANCE  # False for NaN
        with np.errstate(divide="ignore", invalid="ignore"):
            np.divide(unit, lengths[:, None], out=unit)
            np.matmul(unit, self._weight, out=made)
            made += self._bias
            lengths = np.sqrt(np.einsum("nd,nd->n", made, made))
            np.divide(made, lengths[:, None], out=made)
        good &= np.isfinite(lengths) & (lengths > np.finfo(np.float32).tiny)
        if keep is not None:
            good |= keep
        if not good.all():
            return int(np.argmin(good))
        if keep is None or not keep.any():
            np.copyto(out, made, casting="same_kind")
        else:
            np.copyto(out, np.where(keep[:, None], rows, made), casting="same_kind")
        return None


def maps_of_bundle(bundle: Bundle) -> dict[TowerName, EmbeddingMap]:
    """The map of each tower.

    Raises:
        InputError: If the edit of the bundle maps no embeddings.
        IntegrityError: If its patch file is not what it should be.
    """
    weights_before(bundle.manifest.edit)
    tensors = arrays_from(bundle.read(_PATCH), _PATCH)
    return {tower: _map(tensors, name, bundle.manifest.model.embed_dim) for tower, name in MAP_NAMES.items()}


def _map(tensors: Mapping[str, np.ndarray], name: str, dim: int) -> EmbeddingMap:
    """What a patch holds of a map are the bits of its values, since the source model has none."""
    parts = [tensors.get(f"{name}.{part}", np.empty(0)) for part in ("weight", "bias")]
    if any(part.dtype != np.int32 for part in parts):
        raise IntegrityError(f"{_PATCH} does not hold {name}", fix="build again")
    weight, bias = (part.view(np.float32) for part in parts)
    if (weight.shape, bias.shape) != ((dim, dim), (dim,)) or not all(np.isfinite(one).all() for one in (weight, bias)):
        raise IntegrityError(f"{name} in {_PATCH} is no map of {dim} numbers", fix="build again")
    return EmbeddingMap(weight, bias)
