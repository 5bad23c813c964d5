"""Quadruples and the protocol of everything that yields them (method.md section 1)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from uwm_deploy.errors import DataError
from uwm_deploy.recipes.data_set import CalibrationSet
from uwm_deploy.records.data import CalibrationRecord, LeftOut
from uwm_deploy.records.model import Digest

ROOT_VARIABLE = "UWM_DEPLOY_DATA"
"""Environment variable with the folder of all data sets that ship as a definition only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quadruple:
    """A safe and an unsafe image, a safe and an unsafe text; a set for one tower leaves the other's members None."""

    id: str
    concept: str
    safe_image: Image.Image | None
    unsafe_image: Image.Image | None
    safe_text: str | None
    unsafe_text: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """Preprocessed pairs for one tower.

    Attributes:
        ids: b item ids.
        safe: (b, 3, H, W) float32 pixels, or (b, L) int64 ids.
        unsafe: (b, 3, H, W) float32 pixels, or (b, L) int64 ids: the unsafe counterpart of each row.
        safe_counts: (b,) int64, tokens that the tokenizer's attention mask counts; None for images.
        unsafe_counts: (b,) int64, likewise.
    """

    ids: tuple[str, ...]
    safe: np.ndarray
    unsafe: np.ndarray
    safe_counts: np.ndarray | None = None
    unsafe_counts: np.ndarray | None = None

    def rows(self, rows: slice) -> PairBatch:
        """Some of the pairs."""
        counts = [part if part is None else part[rows] for part in (self.safe_counts, self.unsafe_counts)]
        return PairBatch(
            ids=self.ids[rows],
            safe=self.safe[rows],
            unsafe=self.unsafe[rows],
            safe_counts=counts[0],
            unsafe_counts=counts[1],
        )

    @property
    def counts(self) -> np.ndarray | None:
        """(2b,) int64, of the safe and then of the unsafe side; None for images."""
        if self.safe_counts is None or self.unsafe_counts is None:
            return None
        return np.concatenate([self.safe_counts, self.unsafe_counts])


class LabelledImage(NamedTuple):
    """One zero-shot item."""

    image: Image.Image
    label: int


class ZeroShotSet(Protocol):
    """A labelled set with a prompt per class."""

    @property
    def name(self) -> str:
        """Name of the set."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names."""

    @property
    def template(self) -> str:
        """Prompt with `{}` for the class name."""

    def __len__(self) -> int:
        """Number of items."""

    def read(self, index: int) -> LabelledImage:
        """One item; raises DataError when it is broken."""


class QuadrupleSource(Protocol):
    """A set of quadruples with random access, so that worker processes can read it; cheapest in ascending order.

    Attributes:
        unused_names: Names in the set's `concept_names` that no item has.
        zero_shot_names: Its zero-shot sets that are here.
        zero_shot_missing: The others, each with the reason.
    """

    ids: list[str]
    concepts: list[str]
    has_images: bool
    has_texts: bool
    unused_names: tuple[str, ...]
    zero_shot_names: tuple[str, ...]
    zero_shot_missing: Mapping[str, str]

    @property
    def record(self) -> CalibrationRecord:
        """What the set resolved to; digests of all its content are made when it is first asked for."""

    def __len__(self) -> int:
        """Number of quadruples."""

    def read(self, index: int) -> Quadruple:
        """One quadruple; raises DataError that names the item when it is broken."""

    def read_texts(self, index: int) -> tuple[str, str] | None:
        """Safe and unsafe text of one quadruple, without opening its images; None when it has none."""

    def zero_shot(self, name: str) -> ZeroShotSet:
        """One of `zero_shot_names`."""


def check_own_pairs(spec: CalibrationSet) -> None:
    """Checks that a set is paired as it was made: SafeGround is defined on counterparts.

    Raises:
        DataError: If it is not.
    """
    if spec.pairing != "own":
        raise DataError(
            f"data set {spec.name} has pairing = {spec.pairing!r}, which is for scoring", fix="use a set of own pairs"
        )


def record_of(
    spec: CalibrationSet,
    ids: Sequence[str],
    concepts: Sequence[str],
    content_digest: Digest,
    left_out: Sequence[LeftOut] = (),
    left_out_counts: Mapping[str, int] | None = None,
) -> CalibrationRecord:
    """Record of a set."""
    ordered = hashlib.sha256()
    for position, item in enumerate(ids):
        ordered.update(f"\n{item}".encode() if position else item.encode())
    return CalibrationRecord(
        name=spec.name,
        split=spec.split,
        n=len(ids),
        ids_digest=f"sha256:{ordered.hexdigest()}",
        content_digest=content_digest,
        concepts=dict(sorted(Counter(concepts).items())),
        left_out=tuple(left_out),
        left_out_counts=dict(left_out_counts or {}),
        pairing=spec.pairing,
    )
