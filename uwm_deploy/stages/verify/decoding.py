"""Measures decoding at a reduced size: decisions of the edited model, against those on images that are decoded in full."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from uwm_deploy.data.crops import CropStore, PixelRows
from uwm_deploy.data.embedding import Encode, unit_rows
from uwm_deploy.data.files import FileSource
from uwm_deploy.data.reading import Progress, read_all
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.records.evidence import ScaledDecoding
from uwm_deploy.runtime.image import crop_from_image, image_from, was_reduced
from uwm_deploy.safeground.embedded import EmbeddedSet, flips_between
from uwm_deploy.stages.verify.verify import encode_with
from uwm_deploy.towers.protocol import LoadedModel

_SIDES = ("safe", "unsafe")


def scaled_decoding(
    source: QuadrupleSource, edited: LoadedModel, full: EmbeddedSet, *, workers: int, batch: int, progress: Progress
) -> ScaledDecoding | None:
    """Embeds every image that can be reduced once more.

    Args:
        source: The evaluation set.
        edited: The edited model.
        full: Its embeddings of the set, decoded in full.
        workers: Decoding processes.
        batch: Rows per call of the model.
        progress: Called as it goes on.

    Returns:
        What was measured; None for a set without files, such as the demo's, whose pictures are drawn.
    """
    if not isinstance(source, FileSource) or not source.has_images:
        return None
    store = CropStore(edited.ref.image)
    rows = [store.rows(len(source)) for _ in _SIDES]
    read = partial(_reduced, source, rows)
    reduced = np.array(list(read_all(read, len(source), workers, "scaled decoding", progress)), dtype=bool).reshape(
        -1, 2
    )
    some = np.flatnonzero(reduced.any(axis=1))
    images = 2 * len(source)
    if not len(some):
        return ScaledDecoding(images=images, reduced=0)
    before = _rows_of(full, some)
    encode = encode_with(edited.image)
    members, cosines = {}, []
    for side, part in enumerate(_SIDES):
        name, chosen = f"{part}_image", np.flatnonzero(reduced[:, side])
        found = _embedded(encode, rows[side], chosen, batch)
        embeds = getattr(full, name).copy()
        cosines.append(np.einsum("nd,nd->n", embeds[chosen].astype(np.float64), found))
        embeds[chosen] = found
        members[name] = embeds[some]
    return ScaledDecoding(
        images=images,
        reduced=int(reduced.sum()),
        cosine_min=float(np.concatenate(cosines).min()),
        cosine_mean=float(np.concatenate(cosines).mean()),
        flips=flips_between(before, dataclasses.replace(before, **members), None),
    )


def _reduced(source: FileSource, rows: list[PixelRows], index: int) -> tuple[bool, bool]:
    """Which images of a quadruple can be reduced; their crops are put where they belong."""
    _, images = source.members(index)
    found = [_reduced_crop(image, part, index) for image, part in zip(images, rows, strict=True)]
    return found[0], found[1]


def _reduced_crop(source: Path | bytes | None, rows: PixelRows, index: int) -> bool:
    if source is None or not _is_jpeg(source):
        return False
    image: Image.Image = image_from(source, scaled_for=rows.spec)
    if not was_reduced(image):
        return False
    rows.crops[index] = crop_from_image(image, rows.spec)
    return True


def _is_jpeg(source: Path | bytes) -> bool:
    """By its first bytes: other images were decoded once already, and are not decoded again."""
    if isinstance(source, bytes):
        return source[:2] == _JPEG
    with source.open("rb") as stream:
        return stream.read(2) == _JPEG


_JPEG = b"\xff\xd8"


def _embedded(encode: Encode, rows: PixelRows, chosen: np.ndarray, batch: int) -> np.ndarray:
    parts = [unit_rows(encode(rows[chosen[i : i + batch]])) for i in range(0, len(chosen), batch)]
    return np.concatenate(parts) if parts else np.empty((0, 1), dtype=np.float32)


def _rows_of(embedded: EmbeddedSet, rows: np.ndarray) -> EmbeddedSet:
    """Some items of a set, without its zero-shot sets."""
    members = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")
    places = {int(row): place for place, row in enumerate(rows)}
    groups = [tuple(places[row] for row in group if row in places) for group in embedded.alike]
    return dataclasses.replace(
        embedded,
        ids=tuple(embedded.ids[row] for row in rows),
        concepts=tuple(embedded.concepts[row] for row in rows),
        alike=tuple(group for group in groups if len(group) > 1),
        zero_shot={},
        **{name: getattr(embedded, name)[rows] for name in members},
    )
