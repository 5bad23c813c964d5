"""Runs an evaluation set through a pair of encoders; inputs are preprocessed once and shared by every model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from uwm_deploy.datasets.crops import CropStore, PixelRows
from uwm_deploy.datasets.reading import Progress, read_all
from uwm_deploy.datasets.source import Quadruple, QuadrupleSource, ZeroShotSet
from uwm_deploy.errors import DataError
from uwm_deploy.records import Digest, ImageSpec
from uwm_deploy.runtime.image import crop_from_image
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.embedded import EmbeddedSet, ZeroShotEmbeddings
from uwm_deploy.workspace import digest_of_bytes

Encode = Callable[[np.ndarray], np.ndarray]
Inputs = np.ndarray | PixelRows
"""Rows of one input; pixels are normalised as slices of them are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedZeroShot:
    """Inputs of one zero-shot set: pixels (n, 3, H, W), labels (n,), class prompts as ids (c, L)."""

    pixels: Inputs
    labels: np.ndarray
    prompts: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSet:
    """Preprocessed evaluation set.

    Attributes:
        safe_pixels: (n, 3, H, W) float32, made slice by slice from crops that lie in a temporary file when they are many.
        safe_ids: (n, L) int64.
        zero_shot_missing: Sets that were asked for and are not here, with the reason.
    """

    ids: tuple[str, ...]
    concepts: tuple[str, ...]
    safe_pixels: Inputs
    unsafe_pixels: Inputs
    safe_ids: np.ndarray
    unsafe_ids: np.ndarray
    zero_shot: dict[str, PreparedZeroShot]
    zero_shot_missing: Mapping[str, str] = field(default_factory=dict)


def prepare(
    source: QuadrupleSource, image: ImageSpec, tokenizer: Tokenizer, *, workers: int, progress: Progress
) -> PreparedSet:
    """Reads and preprocesses a whole set with the code that serves.

    Raises:
        DataError: If an item cannot be read, or has no image or no text: an evaluation leaves nothing out.
        PrerequisiteError: If the disk has no room for the preprocessed images.
    """
    if not (source.has_images and source.has_texts):
        raise DataError(f"data set {source.record.name} has no whole quadruples", fix="evaluate on images and texts")
    store = CropStore(image)
    safe, unsafe = store.rows(len(source)), store.rows(len(source))
    read = partial(_quadruple, source, safe, unsafe)
    texts = list(read_all(read, len(source), workers, "evaluation images", progress))
    zero_shot = {
        name: _zero_shot(source.zero_shot(name), store, tokenizer, workers, progress) for name in source.zero_shot_names
    }
    return PreparedSet(
        ids=tuple(source.ids),
        concepts=tuple(source.concepts),
        safe_pixels=safe,
        unsafe_pixels=unsafe,
        safe_ids=tokenizer.encode([pair[0] for pair in texts]),
        unsafe_ids=tokenizer.encode([pair[1] for pair in texts]),
        zero_shot=zero_shot,
        zero_shot_missing=source.zero_shot_missing,
    )


def embed(
    prepared: PreparedSet, encode_image: Encode, encode_text: Encode, *, label: str, batch: int, progress: Progress
) -> EmbeddedSet:
    """Embeds a prepared set.

    Args:
        prepared: Inputs.
        encode_image: (b, 3, H, W) to (b, d).
        encode_text: (b, L) ids to (b, d).
        label: For the progress bar.
        batch: Rows per call.
        progress: Called as it goes on.
    """
    work: list[tuple[str, Encode, Inputs]] = [
        ("safe_image", encode_image, prepared.safe_pixels),
        ("unsafe_image", encode_image, prepared.unsafe_pixels),
        ("safe_text", encode_text, prepared.safe_ids),
        ("unsafe_text", encode_text, prepared.unsafe_ids),
    ]
    for name, part in prepared.zero_shot.items():
        work += [(f"{name}.images", encode_image, part.pixels), (f"{name}.classes", encode_text, part.prompts)]
    total, done, rows = sum(len(inputs) for _, _, inputs in work), 0, {}
    for key, encode, inputs in work:
        parts = []
        for start in range(0, len(inputs), batch):
            parts.append(encode(inputs[start : start + batch]))
            done += len(parts[-1])
            progress(label, done, total)
        rows[key] = unit_rows(np.concatenate(parts))
    return EmbeddedSet(
        ids=prepared.ids,
        concepts=prepared.concepts,
        safe_image=rows["safe_image"],
        unsafe_image=rows["unsafe_image"],
        safe_text=rows["safe_text"],
        unsafe_text=rows["unsafe_text"],
        zero_shot={
            name: ZeroShotEmbeddings(images=rows[f"{name}.images"], labels=part.labels, classes=rows[f"{name}.classes"])
            for name, part in prepared.zero_shot.items()
        },
        zero_shot_missing=prepared.zero_shot_missing,
    )


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a zero or broken row becomes NaN, which nothing downstream counts."""
    with np.errstate(invalid="ignore", divide="ignore"):
        result: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32, copy=False)
    return result


def content_digests(source: QuadrupleSource, *, workers: int, progress: Progress) -> set[Digest]:
    """Digest of the content of every readable quadruple, whatever its id."""
    found = read_all(partial(_content, source), len(source), workers, "overlap check", progress)
    return {digest for digest in found if digest}


def content_digest(item: Quadruple) -> Digest:
    """Digest of a quadruple's pixels and texts."""
    parts = [image.convert("RGB").tobytes() if image else b"" for image in (item.safe_image, item.unsafe_image)]
    texts = [(text or "").encode() for text in (item.safe_text, item.unsafe_text)]
    return digest_of_bytes(b"\0".join([*parts, *texts]))


def _content(source: QuadrupleSource, index: int) -> Digest:
    try:
        return content_digest(source.read(index))
    except DataError:
        return ""


def _quadruple(source: QuadrupleSource, safe: PixelRows, unsafe: PixelRows, index: int) -> tuple[str, str]:
    """Puts the images where they belong, and returns the texts."""
    item = source.read(index)
    if item.safe_image is None or item.unsafe_image is None or item.safe_text is None or item.unsafe_text is None:
        raise DataError(f"item {item.id} is not a whole quadruple", fix="evaluate on whole quadruples")
    safe.crops[index] = crop_from_image(item.safe_image, safe.spec)
    unsafe.crops[index] = crop_from_image(item.unsafe_image, unsafe.spec)
    return item.safe_text, item.unsafe_text


def _labelled(part: ZeroShotSet, pixels: PixelRows, index: int) -> int:
    item = part.read(index)
    pixels.crops[index] = crop_from_image(item.image, pixels.spec)
    return item.label


def _zero_shot(
    part: ZeroShotSet, store: CropStore, tokenizer: Tokenizer, workers: int, progress: Progress
) -> PreparedZeroShot:
    pixels = store.rows(len(part))
    labels = list(read_all(partial(_labelled, part, pixels), len(part), workers, f"zero-shot {part.name}", progress))
    prompts = tokenizer.encode([part.template.format(label) for label in part.labels])
    return PreparedZeroShot(pixels=pixels, labels=np.array(labels, dtype=np.int64), prompts=prompts)


def overlap(left: Sequence[str] | set[str], right: Sequence[str] | set[str]) -> int:
    """How many digests two sets share."""
    return len(set(left) & set(right))
