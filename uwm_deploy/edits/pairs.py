"""Pairs for a scoring pass: their order and groups, as a method needs them, and the counts of scored and left-out pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from uwm_deploy.data.order import in_order
from uwm_deploy.data.source import PairBatch, Quadruple, QuadrupleSource
from uwm_deploy.edits.methods import needs_gradients
from uwm_deploy.errors import DataError
from uwm_deploy.recipes.edit_spec import EditSpecs
from uwm_deploy.records.data import LeftOut
from uwm_deploy.records.model import TowerName

MAX_LEFT_OUT_SHARE = 0.01
"""Largest share of pairs without a finite score; a larger one is an error (method.md section 2)."""

SHARD_PAIRS = 1024
"""Pairs that are scored by one process in one go, whatever the number of processes (`edits.sharded_sums`)."""

_NAMED_ITEMS = 5


class Pairs(Protocol):
    """Batches of pairs, and what could not be read."""

    left_out: list[LeftOut]

    @property
    def ids(self) -> Sequence[str]:
        """Items of the whole stream, in order, broken ones included."""

    def part(self, items: range) -> Pairs:
        """The pairs of some items only, in a stream of their own."""

    def check(self, broken: Sequence[LeftOut]) -> None:
        """Raises DataError when more of the whole stream is broken than may be."""

    def __iter__(self) -> Iterator[PairBatch]:
        """Batches in order."""


PairsOf = Callable[[TowerName], Pairs]


@dataclass(slots=True)
class PairCounts:
    """Counts of the pairs of one tower: scored, left out as not finite, not read.

    Attributes:
        tower: The tower.
        total: Number of pairs that reached the tower.
        count: Number of pairs in the scores.
        not_finite: Ids of pairs that some layer left out, in order; the values mean nothing.
        unread: Items that could not be read and so never reached the tower, by id.
    """

    tower: TowerName
    total: int = 0
    count: int = 0
    not_finite: dict[str, None] = field(default_factory=dict)
    unread: dict[str, LeftOut] = field(default_factory=dict)

    def leave_out(self, ids: Iterable[str]) -> None:
        """Adds pairs without a finite score."""
        self.not_finite.update(dict.fromkeys(ids))

    def not_read(self, items: Iterable[LeftOut]) -> None:
        """Adds items that could not be read; the first reason of an item stays."""
        for item in items:
            self.unread.setdefault(item.id, item)

    def add(self, other: PairCounts) -> None:
        """Adds the counts of other pairs of the same tower; `count` stays, until `add_score` adds a whole score."""
        self.total += other.total
        self.leave_out(other.not_finite)
        self.not_read(other.unread.values())

    def left_out(self) -> tuple[LeftOut, ...]:
        """Items that are not in the scores, with the reasons."""
        return (*self.unread.values(), *(LeftOut(id=i, reason="not finite") for i in self.not_finite))

    def check(self) -> None:
        """Checks that there were pairs, and that nearly all of them have a finite score.

        Raises:
            DataError: If there were none, or more than 1% have no finite contribution.
        """
        if self.total == 0:
            raise DataError(f"no pair reached the {self.tower.value} tower", fix="check the calibration set")
        if len(self.not_finite) > MAX_LEFT_OUT_SHARE * self.total:
            raise DataError(
                f"{len(self.not_finite)} of {self.total} {self.tower.value} pairs have no finite score "
                f"({', '.join(list(self.not_finite)[:_NAMED_ITEMS])})",
                fix="remove empty captions and constant images",
            )

    def add_score(self, count: int, concept: str) -> int:
        """Adds the pairs of one score to `count`, and returns their number.

        Raises:
            DataError: If there are none.
        """
        if not concept:
            self.check()
        elif count == 0:
            raise no_pair_of(concept, self.tower)
        self.count += count
        return count


def no_pair_of(concept: str, tower: TowerName) -> DataError:
    """The error for a concept without a pair: the union of the concepts' selections would lack it."""
    return DataError(f"concept {concept!r} has no {tower.value} pair with a score", fix="check its items")


def scoring_order(source: QuadrupleSource, edits: EditSpecs, seed: int) -> QuadrupleSource:
    """A set in the order that a method needs.

    Concepts follow each other for one score per concept. Gradients depend on which items share a batch, so their order is a
    seeded shuffle. For other methods it is the set's own.

    Raises:
        DataError: If the method needs quadruples and the set has only images or only texts.
    """
    order = list(range(len(source)))
    if needs_gradients(edits.method):
        if not (source.has_images and source.has_texts):
            raise DataError(
                f"data set {source.record.name} has no {'texts' if source.has_images else 'images'}, and method "
                f"{edits.method.value} compares each with the other",
                fix="use a set of whole quadruples, or another --method",
            )
        order = [int(i) for i in np.random.default_rng(seed).permutation(len(source))]
    if edits.per_concept:
        order.sort(key=lambda index: source.concepts[index])
    return source if order == sorted(order) else in_order(source, order)


def repaired(source: QuadrupleSource, partners: Sequence[int]) -> QuadrupleSource:
    """A set in which each item gets the safe members of another item, and keeps everything else.

    Args:
        source: The set.
        partners: For each item, the place of the item whose safe members it gets.
    """
    return cast(QuadrupleSource, _Repaired(source, partners))


class _Repaired:
    """A set with safe members from other items."""

    def __init__(self, source: QuadrupleSource, partners: Sequence[int]) -> None:
        self._source, self._partners = source, partners

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, index: int) -> Quadruple:
        safe = self._source.read(self._partners[index])
        return dataclasses.replace(self._source.read(index), safe_image=safe.safe_image, safe_text=safe.safe_text)

    def read_texts(self, index: int) -> tuple[str, str] | None:
        safe, own = self._source.read_texts(self._partners[index]), self._source.read_texts(index)
        return (safe[0], own[1]) if safe and own else None
