"""The affine map that ends an edited model of placement `embedding`, in numpy: what it makes of stored embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.records import TowerName
from uwm_deploy.runtime.bundle import Bundle
from uwm_deploy.runtime.space import EMBEDDING, placement_of

LENGTH_TOLERANCE = 1e-3
"""How far from 1 an embedding's length may be; float16 rounds by less than half of this."""

_PATCH = "patch.safetensors"
_AGAIN = "build with --placement embedding, or embed the items again with `uwm-deploy embed`"


@dataclass(frozen=True, slots=True)
class EmbeddingMap:
    """y to (A y + c) / ||A y + c||, for embeddings y of length 1.

    Attributes:
        weight: A, (d, d) float32.
        bias: c, (d,) float32.

    Raises:
        InputError: If the shapes do not belong together.
    """

    weight: np.ndarray
    bias: np.ndarray

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.weight.shape != (*self.bias.shape, *self.bias.shape):
            raise InputError(f"a map of shape {self.weight.shape} has a bias of shape {self.bias.shape}")

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
            out: (n, d) of any element type; may be `rows`.
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
    edit, name = bundle.manifest.edit, bundle.manifest.name
    if (placement := placement_of(edit)) != EMBEDDING:
        where = "in the weights" if placement else f"of method {edit.method.value}, which changes weights only"
        raise InputError(f"the edit of {name} is {where}: no map takes stored embeddings there", fix=_AGAIN)
    tensors = _tensors(bundle.read(_PATCH))
    found = {}
    for tower in TowerName:
        parts = [tensors.get(f"{tower.value}_map.{part}") for part in ("weight", "bias")]
        if all(part is None for part in parts):
            continue
        found[tower] = _map(parts, bundle.manifest.model.embed_dim, tower)
    if not found:
        raise IntegrityError(f"{_PATCH} holds no map", fix="build the bundle again")
    return found


def _map(parts: list[np.ndarray | None], dim: int, tower: TowerName) -> EmbeddingMap:
    weight, bias = parts
    if (
        weight is None
        or bias is None
        or (weight.shape, bias.shape) != ((dim, dim), (dim,))
        or not (np.isfinite(weight).all() and np.isfinite(bias).all())
    ):
        raise IntegrityError(f"the {tower.value} map in {_PATCH} is no map of {dim} numbers", fix="build again")
    return EmbeddingMap(weight.astype(np.float32), bias.astype(np.float32))


def _tensors(data: bytes) -> dict[str, np.ndarray]:
    try:
        tensors: dict[str, np.ndarray] = load(data)
    except SafetensorError as error:
        raise IntegrityError(f"{_PATCH} cannot be read: {error}", fix="build again") from error
    return tensors
