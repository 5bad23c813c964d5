"""Runs an evaluation set through a pair of encoders; inputs are preprocessed once and shared by every model."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import numpy as np

from uwm_deploy.datasets.source import QuadrupleSource, ZeroShotSet
from uwm_deploy.errors import DataError
from uwm_deploy.records import ImageSpec
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.embedded import EmbeddedSet, ZeroShotEmbeddings
from uwm_deploy.workspace import digest_of_bytes

Encode = Callable[[np.ndarray], np.ndarray]
Progress = Callable[[str, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedZeroShot:
    """Inputs of one zero-shot set: pixels (n, 3, H, W), labels (n,), class prompts as ids (c, L)."""

    pixels: np.ndarray
    labels: np.ndarray
    prompts: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSet:
    """Preprocessed evaluation set.

    Attributes:
        safe_pixels: (n, 3, H, W) float32.
        safe_ids: (n, L) int64.
    """

    ids: tuple[str, ...]
    concepts: tuple[str, ...]
    safe_pixels: np.ndarray
    unsafe_pixels: np.ndarray
    safe_ids: np.ndarray
    unsafe_ids: np.ndarray
    zero_shot: dict[str, PreparedZeroShot]


def prepare(
    source: QuadrupleSource, image: ImageSpec, tokenizer: Tokenizer, *, workers: int, progress: Progress
) -> PreparedSet:
    """Reads and preprocesses a whole set with the code that serves.

    Raises:
        DataError: If an item cannot be read, or has no image or no text: an evaluation leaves nothing out.
    """
    if not (source.has_images and source.has_texts):
        raise DataError(f"data set {source.record.name} has no whole quadruples", fix="evaluate on images and texts")
    rows = _read_all(partial(_quadruple, source, image), len(source), workers, "evaluation images", progress)
    safe, unsafe, texts = zip(*rows, strict=True)
    zero_shot = {
        name: _zero_shot(source.zero_shot(name), image, tokenizer, workers, progress) for name in source.zero_shot_names
    }
    return PreparedSet(
        ids=tuple(source.ids),
        concepts=tuple(source.concepts),
        safe_pixels=np.stack(safe),
        unsafe_pixels=np.stack(unsafe),
        safe_ids=tokenizer.encode([pair[0] for pair in texts]),
        unsafe_ids=tokenizer.encode([pair[1] for pair in texts]),
        zero_shot=zero_shot,
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
    work: list[tuple[str, Encode, np.ndarray]] = [
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
    )


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a zero or broken row becomes NaN, which nothing downstream counts."""
    with np.errstate(invalid="ignore", divide="ignore"):
        result: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32, copy=False)
    return result


def content_digests(source: QuadrupleSource, *, workers: int, progress: Progress) -> set[str]:
    """Digest of the content of every readable quadruple, whatever its id."""
    found = _read_all(partial(_content, source), len(source), workers, "overlap check", progress)
    return {digest for digest in found if digest}


def _content(source: QuadrupleSource, index: int) -> str:
    try:
        item = source.read(index)
    except DataError:
        return ""
    parts = [image.convert("RGB").tobytes() if image else b"" for image in (item.safe_image, item.unsafe_image)]
    texts = [(text or "").encode() for text in (item.safe_text, item.unsafe_text)]
    return digest_of_bytes(b"\0".join([*parts, *texts]))


def _quadruple(source: QuadrupleSource, spec: ImageSpec, index: int) -> tuple[np.ndarray, np.ndarray, tuple[str, str]]:
    item = source.read(index)
    if item.safe_image is None or item.unsafe_image is None or item.safe_text is None or item.unsafe_text is None:
        raise DataError(f"item {item.id} is not a whole quadruple", fix="evaluate on whole quadruples")
    return (
        pixels_from_image(item.safe_image, spec),
        pixels_from_image(item.unsafe_image, spec),
        (item.safe_text, item.unsafe_text),
    )


def _labelled(part: ZeroShotSet, spec: ImageSpec, index: int) -> tuple[np.ndarray, int]:
    item = part.read(index)
    return pixels_from_image(item.image, spec), item.label


def _zero_shot(
    part: ZeroShotSet, image: ImageSpec, tokenizer: Tokenizer, workers: int, progress: Progress
) -> PreparedZeroShot:
    rows = _read_all(partial(_labelled, part, image), len(part), workers, f"zero-shot {part.name}", progress)
    pixels, labels = zip(*rows, strict=True)
    prompts = tokenizer.encode([part.template.format(label) for label in part.labels])
    return PreparedZeroShot(pixels=np.stack(pixels), labels=np.array(labels, dtype=np.int64), prompts=prompts)


def _read_all(read: Callable[[int], T], n: int, workers: int, label: str, progress: Progress) -> list[T]:
    """Every item in order, in worker processes."""
    if workers == 0:
        return [read(index) for index in range(n)]
    rows: list[T] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=ignore_interrupts) as pool:
        for row in pool.map(read, range(n), chunksize=max(1, min(64, n // (4 * workers)))):
            rows.append(row)
            progress(label, len(rows), n)
    return rows


def ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; only the parent acts on it, and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def overlap(left: Sequence[str] | set[str], right: Sequence[str] | set[str]) -> int:
    """How many digests two sets share."""
    return len(set(left) & set(right))
