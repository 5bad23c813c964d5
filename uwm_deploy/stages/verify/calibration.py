"""What the calibration set calls unsafe, by the source model: the evaluation set must mean the same."""

from __future__ import annotations

import numpy as np

from uwm_deploy.data.embedding import unit_rows
from uwm_deploy.data.order import some_of
from uwm_deploy.data.reading import Progress
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.health import Differences
from uwm_deploy.stages.verify.verify import EMBED_BATCH, encode_with
from uwm_deploy.towers.protocol import LoadedModel

ITEMS = 128
"""Calibration items that are embedded."""


def differences_of(
    original: LoadedModel, source: QuadrupleSource, tokenizer: Tokenizer, *, workers: int, progress: Progress
) -> dict[TowerName, Differences]:
    """Unsafe less safe embeddings of some calibration items.

    Args:
        original: The source model.
        source: The calibration set; items that cannot be read are left out.
        tokenizer: Of the model.
        workers: Decoding processes.
        progress: Called as it goes on.

    Returns:
        By tower, as far as the set has images and texts.
    """
    some, found = some_of(source, ITEMS), {}
    concepts = dict(zip(some.ids, some.concepts, strict=True))
    for tower, there in ((TowerName.IMAGE, source.has_images), (TowerName.TEXT, source.has_texts)):
        if not there:
            continue
        pairs = PairStream(
            some, tower, original.ref.image, tokenizer,
            batch_pairs=EMBED_BATCH, workers=workers, max_broken_share=1.0, progress=progress,
        )  # fmt: skip
        encode, rows = encode_with(original.tower(tower)), []
        ids: list[str] = []
        for batch in pairs:
            rows.append(unit_rows(encode(batch.unsafe)) - unit_rows(encode(batch.safe)))
            ids += batch.ids
        if len(ids) > 1:
            found[tower] = Differences(np.concatenate(rows), tuple(concepts[name] for name in ids))
    return found
