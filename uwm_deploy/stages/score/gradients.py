"""The scoring pass of the gradient baselines: images and captions of the same items, through both towers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uwm_deploy.data.source import PairBatch
from uwm_deploy.edits.gradient import LOSSES, Embedded, GradientScorer, only_requiring_grad
from uwm_deploy.edits.methods import PRESETS, gradient_batch
from uwm_deploy.edits.pairs import PairCounts, PairsOf
from uwm_deploy.edits.sharded_sums import PartialSum
from uwm_deploy.errors import ContractError
from uwm_deploy.recipes.edit_spec import EditSpecs
from uwm_deploy.records.data import LeftOut
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.memory import Notice
from uwm_deploy.towers.batch_size import BatchSplitter
from uwm_deploy.towers.protocol import LoadedModel, Tower

PART = 16
"""Quadruples per forward pass; the gradient is that of the whole batch whatever this is."""


@dataclass(slots=True)
class Sizes:
    """What memory holds, as it turns out while a tower is scored.

    Attributes:
        forward: Quadruples, or pairs, per forward pass without gradients.
        part: Quadruples per forward pass with gradients.
        notice: Takes a line whenever one of them is halved.
    """

    forward: BatchSplitter
    part: int
    notice: Notice


def by_gradients(model: LoadedModel, pairs: PairsOf, edits: EditSpecs, name: TowerName, sizes: Sizes) -> PartialSum:
    """Sums of the absolute gradients of the edited layers of one tower over some pairs.

    Args:
        model: The source model; weights, gradients and what requires them are as before afterwards.
        pairs: Stream of the pairs for a tower, both towers in the same order.
        edits: Method and layers.
        name: The tower that is scored.
        sizes: What memory holds; changed when it holds less.

    Raises:
        ContractError: If the loss does not depend on an edited layer.
    """
    tower, counts = model.tower(name), PairCounts(name)
    other = model.tower(TowerName.TEXT if name is TowerName.IMAGE else TowerName.IMAGE)
    edit = edits.of(name)
    weights = {layer: module.weight for layer, module in tower.layers(edit.layers).items()}
    streams = {tower_name: pairs(tower_name) for tower_name in TowerName}
    texts = _Rows(streams[TowerName.TEXT])
    scorer = GradientScorer(
        tower.embed,
        weights,
        LOSSES[PRESETS[edits.method].loss],
        gradient_batch(edit, name, model.architecture),
        sizes.part,
        counts.leave_out,
        sizes.notice,
    )
    with only_requiring_grad(model.source, weights):
        for rows in _parts(streams[TowerName.IMAGE], texts, counts):
            counts.total += len(rows.ids)
            for part, (inputs, embedded) in sizes.forward.run(rows, partial(_embedded, tower=tower, other=other)):
                scorer.add(part.ids, inputs, embedded)
        scorer.finish()
    sizes.part = scorer.part
    counts.not_read(chain.from_iterable(stream.left_out for stream in streams.values()))
    counts.not_read(LeftOut(id=item, reason="no image pair") for item in texts.rest())
    return PartialSum(
        sums={layer: [scorer.take_sum(layer)] for layer in weights},
        divisors=dict.fromkeys(weights, scorer.batches),
        count=scorer.count,
        counts=counts,
    )


class _Quadruples(NamedTuple):
    """Preprocessed members of b items, each (b, ...)."""

    ids: tuple[str, ...]
    members: Mapping[TowerName, tuple[np.ndarray, np.ndarray]]

    def rows(self, rows: slice) -> _Quadruples:
        """Some of the items."""
        return _Quadruples(self.ids[rows], {name: (a[rows], b[rows]) for name, (a, b) in self.members.items()})


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


def _parts(images: Iterable[PairBatch], texts: _Rows, counts: PairCounts) -> Iterator[_Quadruples]:
    """Whole quadruples, at most PART at a time; an image pair without its captions is left out."""
    ids: list[str] = []
    rows: list[tuple[np.ndarray, ...]] = []
    for batch in images:
        for item, safe, unsafe in zip(batch.ids, batch.safe, batch.unsafe, strict=True):
            captions = texts.take(item)
            if captions is None:
                counts.not_read([LeftOut(id=item, reason="no text pair")])
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
