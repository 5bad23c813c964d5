"""Zero-shot top-1 of one set, and the mean over sets (method.md section 5). Cosine only: a logit scale changes no order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uwm_deploy.errors import DataError
from uwm_deploy.records.metrics import Proportion
from uwm_deploy.safeground.interval import Groups, clusters_of, wilson
from uwm_deploy.safeground.similarity import similarities


@dataclass(frozen=True, slots=True)
class TopOne:
    """Which items of one set are recognised.

    Attributes:
        hits: (n,) bool, the right class is alone on top.
        ties: (n,) bool, the right class is on top with another one, which is a failure.
    """

    hits: np.ndarray
    ties: np.ndarray

    def proportion(self, alike: Groups = ()) -> Proportion:
        """Share of hits with its Wilson interval.

        Args:
            alike: Items that hang together.

        Raises:
            DataError: If there are no items.
        """
        n = len(self.hits)
        clusters = clusters_of(alike, np.ones(n, dtype=bool))
        return wilson(int(self.hits.sum()), n, int(self.ties.sum()), clusters)


def top1(images: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> TopOne:
    """Decides every item; memory is bounded by chunks of rows.

    Args:
        images: (n, d), any floating dtype, rows of length 1.
        labels: (n,) int64, rows of `classes`.
        classes: (c, d), any floating dtype, rows of length 1, one prompt per class.

    Raises:
        DataError: If an embedding is not finite.
    """
    if not (np.isfinite(images).all() and np.isfinite(classes).all()):
        raise DataError("zero-shot embeddings hold NaN or infinity", fix="mend the model")
    hits, ties = np.zeros(len(images), dtype=bool), np.zeros(len(images), dtype=bool)
    for some in similarities(images, classes):
        own = labels[some.rows]
        some.settle(some.values()[np.arange(len(own)), own])
        values = some.values()
        right = values[np.arange(len(own)), own][:, None]
        hits[some.rows] = (values >= right).sum(1) == 1
        ties[some.rows] = ~hits[some.rows] & ((values > right).sum(1) == 0)
    return TopOne(hits, ties)


def together(parts: Sequence[TopOne]) -> TopOne:
    """Batches of one set as one.

    Raises:
        DataError: If there are none.
    """
    if not parts:
        raise DataError("a zero-shot set has no items", fix="check its folder")
    return TopOne(np.concatenate([p.hits for p in parts]), np.concatenate([p.ties for p in parts]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShotMean:
    """Mean of top-1 over the sets that ran.

    Attributes:
        value: Percent; None when no set ran.
        ran: Sets in the mean.
        asked: Sets that were asked for.
    """

    value: float | None
    ran: int
    asked: int

    @property
    def complete(self) -> bool:
        """Whether every set that was asked for is in the mean."""
        return self.value is not None and self.ran == self.asked


def mean_over_sets(zero_shot: Mapping[str, Proportion], missing: Mapping[str, str]) -> ZeroShotMean:
    """Every set counts the same, whatever its size; a missing one is neither 0 nor left out unsaid."""
    values = [p.value for p in zero_shot.values()]
    mean = sum(values) / len(values) if values else None
    return ZeroShotMean(value=mean, ran=len(values), asked=len(values) + len(missing))
