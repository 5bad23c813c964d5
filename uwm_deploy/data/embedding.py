"""Runs an evaluation set through a pair of encoders; inputs are preprocessed once and shared by every model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast

import numpy as np
from PIL import Image

from uwm_deploy.data.crops import CropStore, PixelRows
from uwm_deploy.data.encoded import ByteStore, EncodedRows, bytes_of, objects
from uwm_deploy.data.ranks import ALONE, Ranks
from uwm_deploy.data.reading import Progress, read_all
from uwm_deploy.data.repeats import Repeats, repeats_in
from uwm_deploy.data.source import Quadruple, QuadrupleSource, ZeroShotSet
from uwm_deploy.errors import DataError
from uwm_deploy.records.head import RISK_LEVEL, RISK_LOGITS
from uwm_deploy.records.model import Digest, ImageSpec
from uwm_deploy.runtime.image import crop_from_image
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.embedded import EmbeddedSet, ZeroShotEmbeddings
from uwm_deploy.safeground.risk import RiskRows, RiskSet, joined_rows

T = TypeVar("T")

_BAND_PIXELS = 1 << 20
"""Pixels of an image that are digested at a time."""

Encode = Callable[[np.ndarray], np.ndarray]
"""From a batch of inputs, (b, 3, H, W) float32 or (b, L) int64, to embeddings (b, d) float32 of any length."""

EncodeAll = Callable[[np.ndarray], dict[str, np.ndarray]]
"""From a batch of inputs to the outputs of a graph by name, (b, ...) float32."""

Inputs = np.ndarray | PixelRows
"""Rows of one input; pixels are normalised as slices of them are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedZeroShot:
    """Inputs of one zero-shot set.

    Attributes:
        pixels: (n, 3, H, W) float32; for a server (n,) object, encoded images.
        labels: (n,) int64, rows of `prompts`.
        prompts: (c, L) int64, ids of one prompt per class; for a server (c,) object, UTF-8 bytes.
    """

    pixels: Inputs
    labels: np.ndarray
    prompts: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSet:
    """Preprocessed evaluation set.

    Attributes:
        ids: n item ids.
        concepts: n concepts.
        safe_pixels: (n, 3, H, W) float32, made slice by slice from crops that lie in a temporary file when they are many.
            For a server (n,) object, encoded images.
        unsafe_pixels: (n, 3, H, W) float32, likewise.
        safe_ids: (n, L) int64; for a server (n,) object, UTF-8 bytes.
        unsafe_ids: (n, L) int64, likewise.
        zero_shot: Inputs by name of the zero-shot set.
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
    # Original and edited model are both embedded with it, and it costs a pass over every pixel.
    _repeats: dict[str, Repeats] = field(init=False, repr=False, compare=False, default_factory=dict)

    def repeats(self, *, batch: int = 1, ranks: Ranks = ALONE) -> Mapping[str, Repeats]:
        """What occurs more than once: among the quadruples under an empty name, in a zero-shot set under its own.

        Args:
            batch: See `prepare`.
            ranks: The processes that share the rows, all of which ask now.
        """
        if not self._repeats:
            pictures, captions = (self.safe_pixels, self.unsafe_pixels), (self.safe_ids, self.unsafe_ids)
            self._repeats[""] = repeats_in(pictures, captions, batch=batch, ranks=ranks)
            for name, part in self.zero_shot.items():
                self._repeats[name] = repeats_in((part.pixels,), (), batch=batch, ranks=ranks)
        return self._repeats


def prepare(
    source: QuadrupleSource,
    image: ImageSpec,
    tokenizer: Tokenizer,
    *,
    workers: int,
    progress: Progress,
    batch: int = 1,
    ranks: Ranks = ALONE,
) -> PreparedSet:
    """Reads and preprocesses a set with the code that serves.

    Args:
        source: The set.
        image: Of the model.
        tokenizer: Of the model.
        workers: Decoding processes.
        progress: Called as it goes on.
        batch: Rows per call of `embed`.
        ranks: With several processes, only what `embed` with the same batch reads in this one is filled in.

    Raises:
        DataError: If an item cannot be read, or has no image or no text: an evaluation leaves nothing out.
        PrerequisiteError: If the disk has no room for the preprocessed images.
    """
    if not (source.has_images and source.has_texts):
        raise DataError(f"data set {source.record.name} has no whole quadruples", fix="evaluate on images and texts")
    store = CropStore(image)
    safe, unsafe = store.rows(len(source)), store.rows(len(source))
    mine = [row for rows in ranks.dealt(len(source), batch) for row in rows]
    read = partial(_of_row, partial(_quadruple, source, safe, unsafe), mine)
    texts = list(read_all(read, len(mine), workers, "evaluation images", progress))
    items = [f"item {source.ids[row]}" for row in mine]
    zero_shot = {
        name: _zero_shot(source.zero_shot(name), store, tokenizer, workers, progress, partial(ranks.dealt, size=batch))
        for name in source.zero_shot_names
    }
    return PreparedSet(
        ids=tuple(source.ids),
        concepts=tuple(source.concepts),
        safe_pixels=safe,
        unsafe_pixels=unsafe,
        safe_ids=_spread(_ids_of(tokenizer, [pair[0] for pair in texts], items), mine, len(source)),
        unsafe_ids=_spread(_ids_of(tokenizer, [pair[1] for pair in texts], items), mine, len(source)),
        zero_shot=zero_shot,
        zero_shot_missing=source.zero_shot_missing,
    )


def prepare_zero_shot(
    source: QuadrupleSource, image: ImageSpec, tokenizer: Tokenizer, *, workers: int, progress: Progress
) -> dict[str, PreparedZeroShot]:
    """Only the zero-shot sets of a set; see `prepare`."""
    store = CropStore(image)
    return {
        name: _zero_shot(source.zero_shot(name), store, tokenizer, workers, progress, partial(ALONE.dealt, size=1))
        for name in source.zero_shot_names
    }


def encoded(source: QuadrupleSource, *, workers: int, progress: Progress) -> PreparedSet:
    """A set as users send it to a server: encoded images (n,) and texts in UTF-8 (n,), both objects.

    Args:
        source: The set.
        workers: Processes that read it.
        progress: Called as it goes on.

    Raises:
        DataError: If an item has no image or no text, or cannot be read.
    """
    if not (source.has_images and source.has_texts):
        raise DataError(f"data set {source.record.name} has no whole quadruples", fix="evaluate on images and texts")
    store = ByteStore()
    safe, unsafe, texts = EncodedRows(store), EncodedRows(store), []
    for images, pair in read_all(partial(_encoded, source), len(source), workers, "evaluation images", progress):
        safe.append(images[0])
        unsafe.append(images[1])
        texts.append(pair)
    return PreparedSet(
        ids=tuple(source.ids),
        concepts=tuple(source.concepts),
        safe_pixels=_as_array(safe),
        unsafe_pixels=_as_array(unsafe),
        safe_ids=objects([pair[0].encode() for pair in texts]),
        unsafe_ids=objects([pair[1].encode() for pair in texts]),
        zero_shot={
            name: _encoded_zero_shot(source.zero_shot(name), store, workers, progress)
            for name in source.zero_shot_names
        },
        zero_shot_missing=source.zero_shot_missing,
    )


def embed(
    prepared: PreparedSet,
    encode_image: Encode,
    encode_text: Encode,
    *,
    label: str,
    batch: int,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> EmbeddedSet:
    """Embeds a prepared set. Several processes embed every so many-th batch each, and all get all of it.

    Args:
        prepared: Inputs.
        encode_image: Images of the prepared set, such as (b, 3, H, W) float32, to embeddings (b, d) float32.
        encode_text: Texts of the prepared set, such as (b, L) int64, to embeddings (b, d) float32.
        label: For the progress bar.
        batch: Rows per call.
        progress: Called as it goes on.
        ranks: The processes that share the work.
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

        def encoded(
            encode: Encode = encode, inputs: Inputs = inputs, done: int = done
        ) -> list[np.ndarray]:  # in one go, so that nobody waits for a process that failed
            parts = []
            for mine in ranks.dealt(len(inputs), batch):
                parts.append(encode(inputs[mine.start : mine.stop]))
                progress(label, done + mine.stop, total)
            return parts

        rows[key] = unit_rows(np.concatenate(ranks.in_turn(ranks.together(encoded))))
        done += len(inputs)
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


def with_groups(embedded: EmbeddedSet, prepared: PreparedSet, *, batch: int, ranks: Ranks = ALONE) -> EmbeddedSet:
    """The same, knowing which items share a picture or a caption: intervals count groups of these.

    Args:
        embedded: What `embed` has made of the prepared set.
        prepared: Inputs.
        batch: As it was for `embed`.
        ranks: As they were for `embed`.
    """
    groups = {name: part.alike for name, part in prepared.repeats(batch=batch, ranks=ranks).items()}
    sets = {name: dataclasses.replace(part, alike=groups[name]) for name, part in embedded.zero_shot.items()}
    return dataclasses.replace(embedded, alike=groups[""], zero_shot=sets)


def risks(prepared: PreparedSet, encode_all: EncodeAll, *, label: str, batch: int, progress: Progress) -> RiskSet:
    """Outputs of a safety head on every image of a prepared set.

    Args:
        prepared: Inputs.
        encode_all: Images of the prepared set, such as (b, 3, H, W) float32, to the outputs of an image graph by name,
            (b, ...) float32.
        label: For the progress bar.
        batch: Rows per call.
        progress: Called as it goes on.
    """
    work = {"safe": prepared.safe_pixels, "unsafe": prepared.unsafe_pixels}
    work |= {f"zero-shot {name}": part.pixels for name, part in prepared.zero_shot.items()}
    total, done, found = sum(map(len, work.values())), 0, {}
    for name, inputs in work.items():
        parts = []
        for start in range(0, len(inputs), batch):
            outputs = encode_all(inputs[start : start + batch])
            parts.append(RiskRows(outputs[RISK_LOGITS], outputs[RISK_LEVEL].reshape(-1)))
            progress(label, done + min(start + batch, len(inputs)), total)
        found[name] = joined_rows(parts)
        done += len(inputs)
    return RiskSet(
        concepts=prepared.concepts,
        safe=found["safe"],
        unsafe=found["unsafe"],
        zero_shot={name: found[f"zero-shot {name}"] for name in prepared.zero_shot},
    )


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their lengths; a zero or broken row becomes NaN, which nothing downstream counts.

    Args:
        rows: (n, d), any floating dtype.

    Returns:
        (n, d) float32, rows of length 1.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        result: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32, copy=False)
    return result


def content_digests(source: QuadrupleSource, *, workers: int, progress: Progress) -> list[Digest]:
    """Digest of the content of every readable quadruple, whatever its id; the same ones as often as they are there."""
    found = read_all(partial(_content, source), len(source), workers, "overlap check", progress)
    return [digest for digest in found if digest]


def content_digest(item: Quadruple) -> Digest:
    """Digest of a quadruple's pixels and texts."""
    hasher = hashlib.sha256()
    for image in (item.safe_image, item.unsafe_image):
        for band in _bands(image) if image else ():
            hasher.update(band.convert("RGB").tobytes())
        hasher.update(b"\0")
    hasher.update("\0".join(text or "" for text in (item.safe_text, item.unsafe_text)).encode())
    return f"sha256:{hasher.hexdigest()}"


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    """An image from top to bottom, some rows at a time: copies of whole ones would take most of a gigabyte."""
    rows = max(1, _BAND_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _content(source: QuadrupleSource, index: int) -> Digest:
    try:
        return content_digest(source.read(index))
    except DataError:
        return ""


def _quadruple(source: QuadrupleSource, safe: PixelRows, unsafe: PixelRows, index: int) -> tuple[str, str]:
    """Puts the images where they belong, and returns the texts."""
    safe_image, unsafe_image, texts = _whole(source.read(index))
    safe.crops[index] = crop_from_image(safe_image, safe.spec)
    unsafe.crops[index] = crop_from_image(unsafe_image, unsafe.spec)
    return texts


def _whole(item: Quadruple) -> tuple[Image.Image, Image.Image, tuple[str, str]]:
    if item.safe_image is None or item.unsafe_image is None or item.safe_text is None or item.unsafe_text is None:
        raise DataError(f"item {item.id} is not a whole quadruple", fix="evaluate on whole quadruples")
    return item.safe_image, item.unsafe_image, (item.safe_text, item.unsafe_text)


def _encoded(source: QuadrupleSource, index: int) -> tuple[tuple[bytes, bytes], tuple[str, str]]:
    safe, unsafe, texts = _whole(source.read(index))
    return (bytes_of(safe), bytes_of(unsafe)), texts


def _encoded_labelled(part: ZeroShotSet, index: int) -> tuple[bytes, int]:
    item = part.read(index)
    return bytes_of(item.image), item.label


def _encoded_zero_shot(part: ZeroShotSet, store: ByteStore, workers: int, progress: Progress) -> PreparedZeroShot:
    rows, labels = EncodedRows(store), []
    for data, label in read_all(
        partial(_encoded_labelled, part), len(part), workers, f"zero-shot {part.name}", progress
    ):
        rows.append(data)
        labels.append(label)
    prompts = objects([part.template.format(label).encode() for label in part.labels])
    return PreparedZeroShot(pixels=_as_array(rows), labels=np.array(labels, dtype=np.int64), prompts=prompts)


def _as_array(rows: EncodedRows) -> np.ndarray:
    """The same; whoever embeds a set takes slices of its rows and nothing else."""
    return cast(np.ndarray, rows)


def _labelled(part: ZeroShotSet, pixels: PixelRows, index: int) -> int:
    item = part.read(index)
    pixels.crops[index] = crop_from_image(item.image, pixels.spec)
    return item.label


def _zero_shot(
    part: ZeroShotSet,
    store: CropStore,
    tokenizer: Tokenizer,
    workers: int,
    progress: Progress,
    dealt: Callable[[int], list[range]],
) -> PreparedZeroShot:
    pixels, mine = store.rows(len(part)), [row for rows in dealt(len(part)) for row in rows]
    read = partial(_of_row, partial(_labelled, part, pixels), mine)
    labels = np.array(list(read_all(read, len(mine), workers, f"zero-shot {part.name}", progress)), dtype=np.int64)
    named = [f"class {label} of {part.name}" for label in part.labels]
    prompts = _ids_of(tokenizer, [part.template.format(label) for label in part.labels], named)
    return PreparedZeroShot(pixels=pixels, labels=_spread(labels, mine, len(part)), prompts=prompts)


def _ids_of(tokenizer: Tokenizer, texts: Sequence[str], named: Sequence[str]) -> np.ndarray:
    """Ids (n, L) int64 of texts; one that has none is named."""
    found = np.zeros((len(texts), tokenizer.spec.context_length), dtype=np.int64)
    for place, row in enumerate(tokenizer.rows(texts)):
        if isinstance(row, DataError):
            raise DataError(f"{named[place]}: its text cannot be used: {row.what}", fix=row.fix)
        found[place] = row
    return found


def _of_row(read: Callable[[int], T], rows: Sequence[int], place: int) -> T:
    """The item at a place in the rows that are read."""
    return read(rows[place])


def _spread(values: np.ndarray, rows: Sequence[int], n: int) -> np.ndarray:
    """Values at their rows of n; the others are zero."""
    result = np.zeros((n, *values.shape[1:]), dtype=values.dtype)
    result[list(rows)] = values
    return result


def overlap(left: Sequence[str] | set[str], right: Sequence[str] | set[str]) -> int:
    """How many digests two sets share."""
    return len(set(left) & set(right))
