"""How well a pair of encoders recognises the items of a zero-shot set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np

from uwm_deploy.data.embedding import Encode, unit_rows
from uwm_deploy.data.ranks import ALONE, Ranks
from uwm_deploy.data.reading import Progress, read_all
from uwm_deploy.data.source import ZeroShotSet
from uwm_deploy.records.model import ImageSpec
from uwm_deploy.runtime.image import crop_from_image, pixels_from_crops
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.top_one import TopOne, together, top1

Batch = tuple[np.ndarray, np.ndarray]


def recognise(
    part: ZeroShotSet,
    image: ImageSpec,
    tokenizer: Tokenizer,
    encode_image: Encode,
    encode_text: Encode,
    *,
    batch: int,
    workers: int,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> TopOne:
    """Top-1 of every item. Prompts are embedded once; images pass through in batches, so memory does not grow.

    Several processes take every so many-th batch each, and all get all of it.

    Args:
        part: The set.
        image: The model's preprocessing.
        tokenizer: The model's.
        encode_image: Pixels (b, 3, H, W) float32 to embeddings (b, d) float32.
        encode_text: Ids (b, L) int64 to embeddings (b, d) float32.
        batch: Rows per call.
        workers: Decoding processes; 0 decodes here.
        progress: Called as it goes on.
        ranks: The processes that share the work.

    Raises:
        DataError: If an item cannot be read, or an embedding is not finite: an evaluation leaves nothing out.
    """

    def found() -> list[TopOne]:
        ids = tokenizer.encode([part.template.format(label) for label in part.labels])
        classes = unit_rows(np.concatenate([encode_text(ids[i : i + batch]) for i in range(0, len(ids), batch)]))
        mine = [row for rows in ranks.dealt(len(part), batch) for row in rows]
        items = read_all(partial(_item, part, image, mine), len(mine), workers, f"zero-shot {part.name}", progress)
        batches = _batches(items, batch, image)
        return [top1(unit_rows(encode_image(pixels)), labels, classes) for pixels, labels in batches]

    return together(ranks.in_turn(ranks.together(found)))


def _item(part: ZeroShotSet, image: ImageSpec, rows: Sequence[int], place: int) -> tuple[np.ndarray, int]:
    item = part.read(rows[place])
    return crop_from_image(item.image, image), item.label


def _batches(rows: Iterator[tuple[np.ndarray, int]], batch: int, image: ImageSpec) -> Iterator[Batch]:
    """Pixels (b, 3, H, W) and labels (b,)."""
    while some := list(islice(rows, batch)):
        crops, labels = zip(*some, strict=True)
        yield pixels_from_crops(np.stack(crops), image), np.array(labels, dtype=np.int64)
