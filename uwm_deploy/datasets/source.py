"""Quadruples and the protocol of everything that yields them (method.md section 1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from uwm_deploy.errors import DataError
from uwm_deploy.recipe import CalibrationSet
from uwm_deploy.records import CalibrationRecord, LeftOut
from uwm_deploy.workspace import digest_of_bytes


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
        unsafe: The unsafe counterpart of each row, same shape.
    """

    ids: tuple[str, ...]
    safe: np.ndarray
    unsafe: np.ndarray


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
    """A set of quadruples with random access, so that worker processes can read it."""

    record: CalibrationRecord
    ids: list[str]
    concepts: list[str]
    has_images: bool
    has_texts: bool
    zero_shot_names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of quadruples."""

    def read(self, index: int) -> Quadruple:
        """One quadruple; raises DataError that names the item when it is broken."""

    def read_texts(self, index: int) -> tuple[str, str] | None:
        """Safe and unsafe text of one quadruple, without opening its images; None when it has none."""

    def zero_shot(self, name: str) -> ZeroShotSet:
        """One of `zero_shot_names`."""


def open_source(spec: CalibrationSet, *, base: Path | None) -> QuadrupleSource:
    """Opens the set that a TOML file defines.

    Args:
        spec: The definition.
        base: Folder that relative paths start from; None for the current one.

    Raises:
        DataError: If it is empty or malformed.
    """
    if spec.source == "demo":
        from uwm_deploy.datasets.demo import DemoSource

        return DemoSource(spec)
    from uwm_deploy.datasets.manifest import ManifestSource

    return ManifestSource(spec, base or Path())


def sample_of(n: int, spec: CalibrationSet) -> list[int]:
    """Indices that are used, in order: all, or a seeded sample of `limit`."""
    if spec.limit <= 0 or spec.limit >= n:
        return list(range(n))
    chosen = np.random.default_rng(spec.seed).choice(n, size=spec.limit, replace=False)
    return sorted(int(i) for i in chosen)


def record_of(
    spec: CalibrationSet,
    ids: Sequence[str],
    concepts: Sequence[str],
    content_digest: str,
    left_out: Sequence[LeftOut] = (),
) -> CalibrationRecord:
    """Record of a set; checks that ids are unique and that there are any.

    Raises:
        DataError: If the set is empty or an id occurs twice.
    """
    if not ids:
        raise DataError(f"data set {spec.name} has no quadruples", fix="check its manifest, split and limit")
    twice = [item for item, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(
            f"data set {spec.name}: id {twice[0]!r} occurs more than once", fix="give every item its own id"
        )
    return CalibrationRecord(
        name=spec.name,
        split=spec.split,
        n=len(ids),
        ids_digest=digest_of_bytes("\n".join(ids).encode()),
        content_digest=content_digest,
        concepts=dict(sorted(Counter(concepts).items())),
        left_out=tuple(left_out),
    )
