"""Items of a set that share a picture or a caption: copies make a set look larger than it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations

import numpy as np

from uwm_deploy.data.crops import PixelRows
from uwm_deploy.data.ranks import ALONE, Ranks

Rows = np.ndarray | PixelRows

Groups = tuple[tuple[int, ...], ...]
"""Row numbers, group by group; a row that is alone is in none."""

_MEMBERS_OF_A_COPY = 2


@dataclass(frozen=True, slots=True)
class Repeats:
    """What occurs more than once in a set.

    Attributes:
        alike: Items that hang together by pictures or captions that they share.
        copies: Items that share at least two members with one earlier item: both pictures, both captions, or one of each.
            One member in common is no copy, since collections have several captions for a picture.
    """

    alike: Groups
    copies: tuple[int, ...]


def repeats_in(pictures: Sequence[Rows], captions: Sequence[Rows], *, batch: int = 1, ranks: Ranks = ALONE) -> Repeats:
    """Compares members as a model sees them: pictures after preprocessing, captions as ids.

    Args:
        pictures: Safe and unsafe ones, (n, 3, H, W) float32 each.
        captions: Safe and unsafe ones, (n, L) int64 each; none for pictures alone, whose copies share that one member.
        batch: Rows that are dealt at a time.
        ranks: With several processes, each looks at the rows that are dealt to it, and all get all of it.
    """
    readers = [*(_reader(b"picture", rows) for rows in pictures), *(_reader(b"caption", rows) for rows in captions)]
    parts = [[sorted({read(row) for read in readers}) for row in rows] for rows in ranks.dealt(len(pictures[0]), batch)]
    members = [own for part in ranks.in_turn(parts) for own in part]
    return Repeats(alike=_groups(members), copies=_copies(members, min(_MEMBERS_OF_A_COPY, len(readers))))


def _groups(members: Sequence[Sequence[bytes]]) -> Groups:
    parent = list(range(len(members)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[bytes, int] = {}
    for row, own in enumerate(members):
        for member in own:
            parent[root(row)] = root(first.setdefault(member, row))
    groups: dict[int, list[int]] = {}
    for row in range(len(members)):
        groups.setdefault(root(row), []).append(row)
    return tuple(tuple(rows) for rows in groups.values() if len(rows) > 1)


def _copies(members: Sequence[Sequence[bytes]], shared: int) -> tuple[int, ...]:
    seen: set[tuple[bytes, ...]] = set()
    found = []
    for row, own in enumerate(members):
        parts = set(combinations(own, shared))
        found += [row] if parts & seen else []
        seen |= parts
    return tuple(found)


def _reader(kind: bytes, rows: Rows) -> Callable[[int], bytes]:
    part = rows.crops if isinstance(rows, PixelRows) else rows

    def read(row: int) -> bytes:
        return blake2b(np.ascontiguousarray(part[row]).tobytes(), digest_size=16, person=kind).digest()

    return read
