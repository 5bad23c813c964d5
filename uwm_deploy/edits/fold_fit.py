"""One fit seen from items that it did not see, for many settings at little cost (docs/safety-axis.md sections 3 and 5).

The parts of an edit are few: a score per (a, rho), repelling axes per rho, one redirect, one set of spare axes. A setting
only puts them together: with B = W + tau D and the spare axes U,

    v'.t' = v.t + tau (D v).t - (U'B v).(U'W t) + own_v const_t + const_v own_t

so a matrix of similarities is one that is computed once per fold and tau, plus a product of a few columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from uwm_deploy.edits.axis import (
    AffineMap,
    axes_of,
    redirect,
    repel_of,
    repelling_rows,
    score_direction,
    spare_axes,
    spare_count,
)
from uwm_deploy.edits.moments import Moments
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting

_CHUNK_ROWS = 256
_TIE = 1e-6
"""Of the mean squared length: similarities this close are equal but for the rounding of float32."""


@dataclass(slots=True, kw_only=True, eq=False)
class FoldFit:
    """Parts of the edit, fitted on the items outside a fold; each is computed once.

    Attributes:
        moments: Of those items, per tower.
        weights: (d, m) per tower.
        spare: (d, s) spare axes, as many as any setting takes.
        step: The redirect of images at tau = 1.
        axes: Repelling axes, as many as any setting takes.
    """

    moments: Mapping[TowerName, Moments]
    weights: Mapping[TowerName, np.ndarray]
    spare: np.ndarray
    step: AffineMap
    axes: int
    _scores: dict[tuple[TowerName, float, float], np.ndarray] = field(default_factory=dict)
    _rows: dict[tuple[TowerName, float], np.ndarray] = field(default_factory=dict)

    def score(self, tower: TowerName, a: float, rho: float) -> np.ndarray:
        """(m,), see `score_direction`."""
        key = (tower, a, rho)
        if key not in self._scores:
            self._scores[key] = score_direction(self.moments[tower], a, rho)
        return self._scores[key]

    def repelling(self, tower: TowerName, rho: float) -> np.ndarray:
        """(axes, m), see `repelling_rows`; the first k of them are those of k axes."""
        key = (tower, rho)
        if key not in self._rows:
            self._rows[key] = repelling_rows(self.moments[tower], self.axes, rho)
        return self._rows[key]


def fold_fit(
    moments: Mapping[TowerName, Moments], weights: Mapping[TowerName, np.ndarray], settings: Sequence[AxisSetting]
) -> FoldFit:
    """Fits what all of some settings need."""
    image = TowerName.IMAGE
    return FoldFit(
        moments=moments,
        weights=weights,
        spare=spare_axes(moments, weights, max(map(spare_count, settings))),
        step=redirect(moments[image], weights[image]),
        axes=max(axes_of(setting, tower) for setting in settings for tower in TowerName),
    )


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Rows of one tower under one setting.

    Attributes:
        own: (n,) on the axis that the tower scores on.
        constant: On the axis that the other tower scores on.
        spare: (n, s) coordinates of the content that the edit takes away.
        length: (n,) of the edited embeddings.
    """

    own: np.ndarray
    constant: float
    spare: np.ndarray
    length: np.ndarray

    def columns(self, tower: TowerName) -> np.ndarray:
        """(n, s + 2): the product of an image's and a text's columns is what the edit adds to their similarity."""
        constant = np.full(len(self.own), self.constant)
        if tower is TowerName.IMAGE:
            return np.column_stack([-self.spare, self.own, constant])
        return np.column_stack([self.spare, constant, self.own])

    def at(self, rows: np.ndarray) -> View:
        """Some of the rows."""
        return View(self.own[rows], self.constant, self.spare[rows], self.length[rows])


@dataclass(slots=True, eq=False)
class SeenRows:
    """Feature rows of one tower seen through a fit.

    Attributes:
        fit: What is applied to them.
        tower: Theirs.
        features: (n, m) float64.
        content: (n, d), W x.
        moved: (n, d), D x: what the redirect adds at tau = 1; None for texts.
    """

    fit: FoldFit
    tower: TowerName
    features: np.ndarray
    content: np.ndarray
    moved: np.ndarray | None = field(init=False)
    _squares: np.ndarray = field(init=False)
    _spare: list[np.ndarray] = field(init=False)
    _scores: dict[tuple[float, float], np.ndarray] = field(default_factory=dict)
    _repelled: dict[float, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.moved = self.fit.step.apply(self.features) if self.tower is TowerName.IMAGE else None
        parts = [self.content] if self.moved is None else [self.content, self.moved]
        self._spare = [part @ self.fit.spare for part in parts]
        products = [np.einsum("nd,nd->n", *pair) for pair in ((p, q) for p in parts for q in parts)]
        self._squares = (
            products[0][None] if self.moved is None else np.stack([products[0], 2 * products[1], products[3]])
        )

    def content_at(self, tau: float) -> np.ndarray:
        """(n, d), B x."""
        return self.content if self.moved is None or not tau else self.content + tau * self.moved

    def view(self, setting: AxisSetting) -> View:
        """The rows under a setting; formula 3 in coordinates."""
        moments, count = self.fit.moments[self.tower], spare_count(setting)
        spare = self._spare[0][:, :count]
        squares = self._squares[0]
        if self.moved is not None and setting.tau:
            spare = spare + setting.tau * self._spare[1][:, :count]
            squares = setting.tau ** np.arange(3) @ self._squares
        own = setting.g * moments.mean_length * (self._score(setting) + setting.o)
        constant = setting.kappa * moments.mean_length
        square = squares - (spare**2).sum(axis=1) + own**2 + constant**2
        if axes := axes_of(setting, self.tower):
            gain = repel_of(setting, self.tower) * moments.mean_length
            square = square + gain**2 / axes * self._repel(setting.rho)[:, axes - 1]
        return View(own, constant, spare, np.sqrt(np.maximum(square, np.finfo(np.float64).tiny)))

    def _score(self, setting: AxisSetting) -> np.ndarray:
        key = (setting.a, setting.rho)
        if key not in self._scores:
            score = self.fit.score(self.tower, *key)
            self._scores[key] = self.features @ score - self.fit.moments[self.tower].mean_safe @ score
        return self._scores[key]

    def _repel(self, rho: float) -> np.ndarray:
        """(n, axes): squares on the repelling axes, added up from the first one."""
        if rho not in self._repelled:
            rows = self.fit.repelling(self.tower, rho)
            centred = self.features @ rows.T - rows @ self.fit.moments[self.tower].mean_safe
            self._repelled[rho] = np.cumsum(centred**2, axis=1)
        return self._repelled[rho]


def ranks(
    base: np.ndarray, queries: np.ndarray, gallery: np.ndarray, lengths: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """How many others lie before the right one, (q,); an equal one lies before it.

    Args:
        base: (q, n) float32 similarities of the contents.
        queries: (q, k) columns of the queries.
        gallery: (n, k) columns of what is looked through.
        lengths: (n,) lengths of the latter's edited embeddings.
        right: (q,) rows of it that are right.
    """
    found = np.empty(len(base), dtype=np.int64)
    # cos_j >= cos_right is product_j - cos_right * length_j >= 0: one column more, and no division of the whole matrix.
    columns = np.column_stack([gallery, lengths]).astype(np.float32).T
    tolerance = np.float32(-_TIE * float(np.mean(lengths) ** 2))
    for start in range(0, len(base), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        rows, hits = np.arange(len(base[part])), right[part]
        cosine = (base[part][rows, hits] + np.einsum("qk,qk->q", queries[part], gallery[hits])) / lengths[hits]
        over = np.column_stack([queries[part], -cosine]).astype(np.float32) @ columns
        over += base[part]
        over[rows, hits] = -np.inf
        found[part] = np.count_nonzero(over >= tolerance, axis=1)
    return found
