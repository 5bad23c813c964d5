"""Stream of preprocessed pairs from a set of quadruples."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from uwm_deploy.data.order import in_order
from uwm_deploy.data.reading import Progress, ignore_interrupts
from uwm_deploy.data.source import PairBatch, QuadrupleSource
from uwm_deploy.edits.pairs import SHARD_PAIRS
from uwm_deploy.errors import DataError
from uwm_deploy.records.data import LeftOut
from uwm_deploy.records.model import ImageSpec, TowerName
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.runtime.tokenizer import Tokenizer

WINDOW_PAIRS = SHARD_PAIRS
"""Text pairs in memory at a time; no window spans two shards."""

_NAMED_ITEMS = 5
_OTHER = {TowerName.IMAGE: TowerName.TEXT, TowerName.TEXT: TowerName.IMAGE}


class PairStream:
    """Pairs of one tower in batches, preprocessed by the code that serves.

    Memory does not grow with the set. Image pairs are decoded in worker processes, in order. Text pairs are sorted by
    length within windows of `WINDOW_PAIRS`, so that a batch is padded to its own longest caption only, where the model's
    rows may be cut; scores are sums, so the order does not matter.

    Attributes:
        left_out: Items that could not be read, after iterating.
    """

    def __init__(
        self,
        source: QuadrupleSource,
        tower: TowerName,
        image: ImageSpec,
        tokenizer: Tokenizer,
        *,
        batch_pairs: int,
        workers: int,
        max_broken_share: float,
        progress: Progress,
        sort_by_length: bool = True,
    ) -> None:
        if not (source.has_images if tower is TowerName.IMAGE else source.has_texts):
            raise DataError(
                f"data set {source.record.name} has no {tower.value} pairs",
                fix=f"edit one tower (--tower {_OTHER[tower]}) or use another set",
            )
        self.left_out: list[LeftOut] = []
        self._source, self._tower, self._image, self._tokenizer = source, tower, image, tokenizer
        self._batch_pairs, self._workers = batch_pairs, workers
        self._max_broken_share, self._progress = max_broken_share, progress
        self._whole, self._first = len(source), 0
        self._sorted = sort_by_length and not tokenizer.spec.fixed_length

    def __len__(self) -> int:
        """Pairs in the set, broken ones included."""
        return len(self._source)

    @property
    def ids(self) -> Sequence[str]:
        """Items in order, broken ones included."""
        return self._source.ids

    def part(self, items: range) -> PairStream:
        """Pairs of some items, by their places. Progress and the limit on broken items are those of the whole set."""
        part = copy.copy(self)
        part.left_out, part._source, part._first = [], in_order(self._source, items), items.start
        return part

    def __iter__(self) -> Iterator[PairBatch]:
        """Batches of at most `batch_pairs` pairs.

        Raises:
            DataError: When more than `max_broken_share` of the items could not be read.
        """
        self.left_out = []
        yield from self._images() if self._tower is TowerName.IMAGE else self._texts()

    def _images(self) -> Iterator[PairBatch]:
        dataset = _ImagePairs(self._source, self._image)
        done = 0
        for items in _loader(dataset, self._batch_pairs, self._workers):
            done += len(items)
            self._leave_out([item for item in items if isinstance(item, LeftOut)])
            pairs = [item for item in items if not isinstance(item, LeftOut)]
            if pairs:
                ids, safe, unsafe = zip(*pairs, strict=True)
                yield PairBatch(ids=ids, safe=np.stack(safe), unsafe=np.stack(unsafe))
            self._report(done)

    def _texts(self) -> Iterator[PairBatch]:
        done = 0
        for items in _loader(_TextPairs(self._source), WINDOW_PAIRS, 0):
            self._leave_out([item for item in items if isinstance(item, LeftOut)])
            pairs = [item for item in items if not isinstance(item, LeftOut)]
            for batch in self._window(pairs):
                yield batch
                done += len(batch.ids)
                self._report(done)
            done += len(items) - len(pairs)

    def _window(self, pairs: Sequence[tuple[str, str, str]]) -> Iterator[PairBatch]:
        """Some pairs in batches of similar length."""
        if not pairs:
            return
        ids, safe, unsafe = zip(*pairs, strict=True)
        left, right = self._tokenizer.encode(safe), self._tokenizer.encode(unsafe)
        lengths = np.maximum(self._lengths(left), self._lengths(right))
        order = np.argsort(lengths, kind="stable") if self._sorted else np.arange(len(ids))
        for start in range(0, len(ids), self._batch_pairs):
            rows = order[start : start + self._batch_pairs]
            width = int(lengths[rows].max()) if self._sorted else left.shape[1]
            yield PairBatch(ids=tuple(ids[i] for i in rows), safe=left[rows, :width], unsafe=right[rows, :width])

    def _lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens up to and including the first end token."""
        result: np.ndarray = (rows == self._tokenizer.spec.eos_id).argmax(1) + 1
        return result

    def check(self, broken: Sequence[LeftOut]) -> None:
        """Checks that not too much of the whole set is broken.

        Raises:
            DataError: When more than `max_broken_share` of the items could not be read, or none could.
        """
        if len(broken) > self._max_broken_share * self._whole or len(broken) == self._whole:
            names = ", ".join(item.id for item in broken[:_NAMED_ITEMS])
            raise DataError(
                f"{len(broken)} of {self._whole} items of {self._source.record.name} cannot be read "
                f"({names}: {broken[0].reason})",
                fix="mend them, or raise max_broken_share in the set's TOML",
            )

    def _leave_out(self, broken: Sequence[LeftOut]) -> None:
        self.left_out.extend(broken)
        self.check(self.left_out)

    def _report(self, done: int) -> None:
        self._progress(f"{self._tower.value} pairs", self._first + done, self._whole)


class _ImagePairs(Dataset[Any]):
    """Preprocessed image pairs, or the reason why there is none."""

    def __init__(self, source: QuadrupleSource, spec: ImageSpec) -> None:
        self.source, self.spec = source, spec

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        try:
            item = self.source.read(index)
        except DataError as error:
            return LeftOut(id=self.source.ids[index], reason=error.what)
        if item.safe_image is None or item.unsafe_image is None:
            return LeftOut(id=item.id, reason="no image pair")
        return item.id, pixels_from_image(item.safe_image, self.spec), pixels_from_image(item.unsafe_image, self.spec)


class _TextPairs(Dataset[Any]):
    """Caption pairs; images of the same item are not opened where the source can avoid it."""

    def __init__(self, source: QuadrupleSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        try:
            pair = self.source.read_texts(index)
        except DataError as error:
            return LeftOut(id=self.source.ids[index], reason=error.what)
        if pair is None:
            return LeftOut(id=self.source.ids[index], reason="no text pair")
        return (self.source.ids[index], *pair)


def _same(items: list[Any]) -> list[Any]:
    return items


def _leave_interrupts(_: int) -> None:
    ignore_interrupts()


def _loader(dataset: Dataset[Any], batch: int, workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=batch,
        shuffle=False,
        num_workers=workers,
        collate_fn=_same,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_leave_interrupts if workers else None,
    )
