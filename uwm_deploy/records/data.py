"""Sets of quadruples: what was read, what was left out, what occurs twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from uwm_deploy.records.model import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """One item that was not used, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """What a data set resolved to.

    Attributes:
        ids_digest: Digest of the ordered ids that are used, one per line.
        content_digest: Digest of how the items are made, or of their concepts, texts and encoded images.
        concepts: Items per concept.
        left_out: Items that are not in the set, the first hundred of them by name.
        left_out_counts: All of them, by reason.
        pairing: Which safe member each unsafe one goes with.
    """

    name: str
    split: str
    n: int
    ids_digest: Digest
    content_digest: Digest
    concepts: Mapping[str, int]
    left_out: tuple[LeftOut, ...] = ()
    left_out_counts: Mapping[str, int] = field(default_factory=dict)
    pairing: Literal["own", "nearest-safe"] = "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlace:
    """`reports/evaluation.json` of a bundle: where the set is that it was measured on.

    Attributes:
        folder: Folder that the set's relative paths start from, as a relative POSIX path from the bundle's own folder.
    """

    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SameContent:
    """Two items with the same pixels and texts, the second one in the same set or in another."""

    id: str
    other: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Items of a set whose content another set has too.

    Attributes:
        name: The other set.
        n: Its items.
        unread: Those of them that cannot be read, and so were not compared.
        compared: What both sets have, and so was compared; nothing when they have nothing in common.
        count: Items of the first set that the other one has.
        items: The first hundred of them.
    """

    name: str
    n: int
    unread: int
    compared: Literal["images and texts", "images", "texts", "nothing"]
    count: int
    items: tuple[SameContent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What a look at every item of a set found. Counts are of all items, lists hold the first hundred.

    Attributes:
        data: What the set resolves to; a build with it has the same digests.
        image_pairs: Items with both images, readable.
        text_pairs: Items with both texts, readable.
        broken_count: Items that cannot be read, or lack a pair that other items of the set have.
        empty_texts: Items with a text of nothing but blanks; they are not broken, but may get no score.
        twice_count: Ids that occur more than once.
        same_count: Items whose content an earlier item has; what is counted twice makes intervals too narrow.
        overlaps: One per set that it was compared with.
        misspelt: Concept with few items to one with many and almost the same name.
        unused_names: Names in `concept_names` that no item has.
        problems: Why the set should not be used as it is; a clean set has none.
    """

    data: CalibrationRecord
    image_pairs: int
    text_pairs: int
    broken_count: int
    broken: tuple[LeftOut, ...]
    empty_texts: int
    twice_count: int
    twice: tuple[str, ...]
    same_count: int
    same: tuple[SameContent, ...]
    overlaps: tuple[Overlap, ...]
    problems: tuple[str, ...]
    misspelt: Mapping[str, str] = field(default_factory=dict)
    unused_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeManifest:
    """A manifest that was written from folders. Lists hold the first hundred.

    Attributes:
        n: Items in it.
        concepts: Items per concept.
        image_pairs: Items with both images.
        text_pairs: Items with both texts.
        unpaired_count: Items left out because their counterpart is not there.
        ignored_count: Files and folders that are no part of the layout.
        unread_count: Columns of a table that nothing was taken from.
    """

    n: int
    concepts: Mapping[str, int]
    image_pairs: int
    text_pairs: int
    unpaired_count: int
    unpaired: tuple[LeftOut, ...]
    ignored_count: int
    ignored: tuple[str, ...]
    unread_count: int = 0
    unread: tuple[str, ...] = ()
