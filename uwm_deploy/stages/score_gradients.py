"""The scoring pass of the gradient baselines: images and captions of the same items, through both towers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uwm_deploy.datasets.source import PairBatch
from uwm_deploy.errors import ContractError
from uwm_deploy.recipe import EditSpecs
from uwm_deploy.records import LeftOut, TowerName
from uwm_deploy.stages.pairs import Group, PairsOf, Tally, runs
from uwm_deploy.towers.protocol import LoadedModel, Tower
from uwm_deploy.uwm.gradient import LOSSES, Embedded, GradientScorer, only_requiring_grad
from uwm_deploy.uwm.methods import PRESETS, gradient_batch

PART = 16
"""Quadruples per forward pass; the gradient is that of the whole batch whatever this is."""


def by_gradients(
    model: LoadedModel, pairs: PairsOf, edits: EditSpecs, concepts: Mapping[str, str] | None, tally: Tally
) -> Iterator[Group]:
    """Importance of the edited layers of one tower, concept by concept when there is one score per concept.

    Args:
        model: The source model; weights, gradients and what requires them are as before afterwards.
        pairs: Stream of pairs for a tower, both towers in the same order.
        edits: Method and layers.
        concepts: Item id to concept; None makes one score of all.
        tally: Of the tower that is scored; filled.

    Raises:
        ContractError: If the loss does not depend on an edited layer.
        DataError: If no pair is left.
    """
    tower = model.tower(tally.tower)
    other = model.tower(TowerName.TEXT if tally.tower is TowerName.IMAGE else TowerName.IMAGE)
    edit = edits.of(tally.tower)
    weights = {name: layer.weight for name, layer in tower.layers(edit.layers).items()}
    batch = gradient_batch(edit, tally.tower, model.ref)
    streams = {name: pairs(name) for name in TowerName}
    images = runs(streams[TowerName.IMAGE], concepts)
    texts = _Rows(streams[TowerName.TEXT])
    for concept, image_batches in images:
        loss = LOSSES[PRESETS[edits.method].loss]
        scorer = GradientScorer(tower.embed, weights, loss, batch, PART, tally.leave_out)
        with only_requiring_grad(model.source, weights):
            for rows in _parts(image_batches, texts, tally):
                tally.total += len(rows.ids)
                inputs, embedded = _embedded(rows, tower, other)
                scorer.add(rows.ids, inputs, embedded)
            scorer.finish()
        count = tally.counted(scorer.count, concept)
        yield concept, {layer: scorer.score(layer).cpu().contiguous() for layer in weights}, count
    tally.not_read(chain.from_iterable(stream.left_out for stream in streams.values()))
    tally.not_read(LeftOut(id=item, reason="no image pair") for item in texts.rest())


class _Quadruples(NamedTuple):
    """Preprocessed members of b items, each (b, ...)."""

    ids: tuple[str, ...]
    members: Mapping[TowerName, tuple[np.ndarray, np.ndarray]]


class _Rows:
    """Rows of a stream by id, in whatever order they are asked for; read no further than asked.

    Both streams come in the same order, so what waits here is at most what the other stream left out. Captions are the
    side that waits: they are small.
    """

    def __init__(self, batches: Iterable[PairBatch]) -> None:
        self._batches = iter(batches)
        self._waiting: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def take(self, item: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Safe and unsafe row of an item; None when the stream has none."""
        while item not in self._waiting:
            batch = next(self._batches, None)
            if batch is None:
                return None
            self._waiting.update(zip(batch.ids, zip(batch.safe, batch.unsafe, strict=True), strict=True))
        return self._waiting.pop(item)

    def rest(self) -> Iterator[str]:
        """Ids that nobody asked for."""
        yield from self._waiting
        for batch in self._batches:
            yield from batch.ids


def _parts(images: Iterable[PairBatch], texts: _Rows, tally: Tally) -> Iterator[_Quadruples]:
    """Whole quadruples, at most PART at a time; an image pair without its captions is left out."""
    ids: list[str] = []
    rows: list[tuple[np.ndarray, ...]] = []
    for batch in images:
        for item, safe, unsafe in zip(batch.ids, batch.safe, batch.unsafe, strict=True):
            captions = texts.take(item)
            if captions is None:
                tally.not_read([LeftOut(id=item, reason="no text pair")])
                continue
            ids.append(item)
            rows.append((safe, unsafe, *captions))
            if len(ids) == PART:
                yield _stacked(ids, rows)
                ids, rows = [], []
    if ids:
        yield _stacked(ids, rows)


def _stacked(ids: list[str], rows: list[tuple[np.ndarray, ...]]) -> _Quadruples:
    safe_image, unsafe_image, safe_text, unsafe_text = zip(*rows, strict=True)
    if len({row.shape for row in (*safe_text, *unsafe_text)}) > 1:
        raise ContractError("captions were cut to different lengths", fix="stream them without sorting by length")
    members = {
        TowerName.IMAGE: (np.stack(safe_image), np.stack(unsafe_image)),
        TowerName.TEXT: (np.stack(safe_text), np.stack(unsafe_text)),
    }
    return _Quadruples(tuple(ids), members)


@torch.no_grad()
def _embedded(rows: _Quadruples, tower: Tower, other: Tower) -> tuple[Tensor, Embedded]:
    """Inputs of the safe queries, and all four embeddings without a graph."""
    device = next(tower.graph_module().parameters()).device
    sides = [torch.from_numpy(side).to(device) for name in (tower.name, other.name) for side in rows.members[name]]
    embeddings = [part for t, pair in ((tower, sides[:2]), (other, sides[2:])) for part in _both(t, *pair)]
    return sides[0], Embedded(*embeddings)


def _both(tower: Tower, safe: Tensor, unsafe: Tensor) -> tuple[Tensor, Tensor]:
    embeddings = tower.embed(torch.cat([safe, unsafe]))
    return embeddings[: len(safe)], embeddings[len(safe) :]
