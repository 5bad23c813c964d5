"""Some items of a set, in some order; nothing is read until they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from uwm_deploy.data.source import Quadruple, QuadrupleSource


def in_order(source: QuadrupleSource, order: Sequence[int]) -> QuadrupleSource:
    """Some items of a set, in a given order."""
    return cast(QuadrupleSource, _InOrder(source, order))


def some_of(source: QuadrupleSource, count: int) -> QuadrupleSource:
    """At most `count` items of a set, evenly spaced, without its zero-shot sets."""
    order = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    part = _InOrder(source, order.tolist())
    part.zero_shot_names = ()
    return cast(QuadrupleSource, part)


class _InOrder:
    """A set in another order; attributes that do not depend on the order are those of the set."""

    def __init__(self, source: QuadrupleSource, order: Sequence[int]) -> None:
        self._source, self._order = source, order
        self.ids = [source.ids[index] for index in order]
        self.concepts = [source.concepts[index] for index in order]

    zero_shot_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self._order)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, index: int) -> Quadruple:
        return self._source.read(self._order[index])

    def read_texts(self, index: int) -> tuple[str, str] | None:
        return self._source.read_texts(self._order[index])
