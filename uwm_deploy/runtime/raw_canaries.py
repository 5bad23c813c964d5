"""Canaries as users send them, encoded images and texts, through preprocessing and tokenisation to the embedding.

The canaries of `safeground.canaries` are rows of numbers: they say nothing of how a picture becomes such a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.bundle.tensors import arrays_from
from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.preprocessing import Preprocessing
from uwm_deploy.safeground.embedded import parity

RAW = 4
"""Canaries of a tower that are kept as users send them."""

COSINE, COSINE_8_BITS = 0.999, 0.9
"""Smallest cosine with the edited model. In 8 bits another filter may pass: the digests of a bundle hold how it prepares."""


@dataclass(frozen=True, slots=True)
class RawCanaries:
    """Some canaries of one tower.

    Attributes:
        items: n encoded images, or n texts in UTF-8.
        edited: (n, d) float32, embeddings by the edited model in PyTorch, of any length.
    """

    items: tuple[bytes, ...]
    edited: np.ndarray

    def tensors(self) -> dict[str, np.ndarray]:
        """What a file of it holds: (bytes,) uint8 per item, and (n, d) float32."""
        return {f"item.{i}": np.frombuffer(item, dtype=np.uint8) for i, item in enumerate(self.items)} | {
            "edited": np.ascontiguousarray(self.edited)
        }


def raw_canaries(bundle: Bundle, towers: Iterable[TowerName]) -> dict[TowerName, RawCanaries]:
    """What a bundle holds of some towers; one of an earlier release, or one that was refitted, holds none.

    Raises:
        IntegrityError: If they cannot be read.
    """
    listed = {file.path for file in bundle.manifest.files}
    names = {tower: BundleLayout.raw_canaries(tower) for tower in towers}
    return {tower: _read(bundle.read(name), name) for tower, name in names.items() if name in listed}


def _read(data: bytes, name: str) -> RawCanaries:
    tensors: Mapping[str, np.ndarray] = arrays_from(data, name)
    edited = tensors.get("edited", np.empty(0))
    items = [tensors.get(f"item.{i}") for i in range(len(tensors) - 1)]
    if edited.ndim != 2 or edited.dtype != np.float32 or len(edited) != len(items):
        raise IntegrityError(f"{name} does not hold an embedding for each item", fix="build again")
    return RawCanaries(tuple(b"" if item is None else item.tobytes() for item in items), edited)


Embed = Callable[[TowerName, Sequence[bytes]], np.ndarray]
"""From a tower and n encoded images or texts to embeddings (n, d) float32 of any length, as they are served."""


def prepared_raw(preprocessing: Preprocessing, tower: TowerName, items: Sequence[bytes]) -> np.ndarray:
    """Rows that a server makes of what it is sent.

    Args:
        preprocessing: Of the model.
        tower: Which tower they are for.
        items: n encoded images, or n texts in UTF-8.

    Returns:
        (n, 3, H, W) float32 pixels, or (n, L) int64 ids.

    Raises:
        IntegrityError: If one of them cannot be prepared.
    """
    if tower is TowerName.IMAGE:
        answers = preprocessing.pixels(items)
    else:
        answers = list(preprocessing.ids("neutral")([item.decode() for item in items]))
    rows = [answer for answer in answers if not isinstance(answer, Exception)]
    if len(rows) < len(answers):
        problem = next(answer for answer in answers if isinstance(answer, Exception))
        raise IntegrityError(f"a canary cannot be prepared: {problem}", fix="build the bundle again")
    return np.stack(rows)


def problem_of_raw(bundle: Bundle, embed: Embed, precision: Precision, towers: Iterable[TowerName] = TowerName) -> str:
    """Sends a bundle's raw canaries the way that users' images and texts go.

    Args:
        bundle: The bundle.
        embed: The way: encoded images or texts to embeddings (n, d) float32 of any length.
        precision: Of what runs.
        towers: Whose.

    Returns:
        Empty when every embedding is the edited model's.

    Raises:
        IntegrityError: If they cannot be read.
    """
    least = COSINE_8_BITS if precision in (Precision.INT8, Precision.FP8, Precision.W8A16) else COSINE
    for tower, canaries in raw_canaries(bundle, towers).items():
        rows = embed(tower, canaries.items)
        if rows.shape != canaries.edited.shape:
            return f"{tower.value}s become embeddings of shape {rows.shape[1:]}, not {canaries.edited.shape[1:]}"
        found = parity(tower, "", 1, canaries.edited, rows).cosine_min
        if found < least:
            what = "an image that is sent encoded" if tower is TowerName.IMAGE else "a text that is sent as it is"
            return f"{what} is not embedded as by the edited model: cosine {found:.6g}, must be at least {least:g}"
    return ""
