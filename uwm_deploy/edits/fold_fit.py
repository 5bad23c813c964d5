"""One fit applied to held-out items, for many settings at little cost (docs/background/safety-axis.md sections 3 and 5).

An edit has few parts: a score per (a, rho), repelling axes per rho, one redirect, one set of spare axes. A setting only
combines them: with B = W + tau D and the spare axes U,

    v'.t' = v.t + tau (D v).t - (U'B v).(U'W t) + own_v const_t + const_v own_t

so a matrix of similarities is a matrix that is computed once per fold and tau, plus a product of a few columns.
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
"""Share of the mean squared length below which two similarities tie: rounding in float32 makes such differences."""


@dataclass(slots=True, kw_only=True, eq=False)
class FoldFit:
    """Parts of the edit, fitted on the items outside a fold; each is computed once.

    Attributes:
        moments: Of those items, per tower.
        weights: (d, m) float64 per tower, the last linear map.
        spare: (d, s) float64, spare axes, as many as the setting with the most takes.
        step: The redirect of images at tau = 1.
        axes: Number of repelling axes, as many as the setting with the most takes.
    """

    moments: Mapping[TowerName, Moments]
    weights: Mapping[TowerName, np.ndarray]
    spare: np.ndarray
    step: AffineMap
    axes: int
    _scores: dict[tuple[TowerName, float, float], np.ndarray] = field(default_factory=dict)
    _rows: dict[tuple[TowerName, float], np.ndarray] = field(default_factory=dict)

    def score(self, tower: TowerName, a: float, rho: float) -> np.ndarray:
        """Direction of a tower's score, (m,) float64; see `score_direction`."""
        key = (tower, a, rho)
        if key not in self._scores:
            self._scores[key] = score_direction(self.moments[tower], a, rho)
        return self._scores[key]

    def repelling(self, tower: TowerName, rho: float) -> np.ndarray:
        """Repelling rows, (axes, m) float64; see `repelling_rows`. A setting with k axes takes the first k of them."""
        key = (tower, rho)
        if key not in self._rows:
            self._rows[key] = repelling_rows(self.moments[tower], self.axes, rho)
        return self._rows[key]


def fold_fit(
    moments: Mapping[TowerName, Moments], weights: Mapping[TowerName, np.ndarray], settings: Sequence[AxisSetting]
) -> FoldFit:
    """Fits the parts that some settings need.

    Args:
        moments: Of the items outside the fold, per tower.
        weights: (d, m) float64 per tower, the last linear map.
        settings: All settings that will be applied.
    """
    image = TowerName.IMAGE
    return FoldFit(
        moments=moments,
        weights=weights,
        spare=spare_axes(moments, weights, max(map(spare_count, settings))),
        step=redirect(moments[image], weights[image]),
        axes=max(axes_of(setting, tower) for setting in settings for tower in TowerName),
    )


@dataclass(frozen=True, slots=True, eq=False)
class EditedRows:
    """Rows of one tower, edited with one setting, as coordinates.

    Attributes:
        own: (n,) float64, coordinate on the axis that the tower scores on.
        constant: Coordinate on the axis that the other tower scores on, the same for every row.
        spare: (n, s) float64, coordinates of the content that the edit removes.
        length: (n,) float64, lengths of the edited embeddings.
    """

    own: np.ndarray
    constant: float
    spare: np.ndarray
    length: np.ndarray

    def columns(self, tower: TowerName) -> np.ndarray:
        """Columns of the rows; the product of an image's and a text's columns is what the edit adds to their similarity.

        Args:
            tower: Tower of the rows.

        Returns:
            (n, s + 2) float64.
        """
        constant = np.full(len(self.own), self.constant)
        if tower is TowerName.IMAGE:
            return np.column_stack([-self.spare, self.own, constant])
        return np.column_stack([self.spare, constant, self.own])

    def at(self, rows: np.ndarray) -> EditedRows:
        """Some of the rows.

        Args:
            rows: (k,) int64, their numbers.
        """
        return EditedRows(self.own[rows], self.constant, self.spare[rows], self.length[rows])


@dataclass(slots=True, eq=False)
class FittedRows:
    """Feature rows of one tower, to which the settings of a fit are applied.

    Attributes:
        fit: The fit.
        tower: Tower of the rows.
        features: (n, m) float64.
        content: (n, d) float64, W x.
        moved: (n, d) float64, D x: what the redirect adds at tau = 1; None for texts.
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
        """Content of the rows at a tau, B x, (n, d) float64."""
        return self.content if self.moved is None or not tau else self.content + tau * self.moved

    def edited(self, setting: AxisSetting) -> EditedRows:
        """The rows edited with a setting: formula 3 in coordinates."""
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
        return EditedRows(own, constant, spare, np.sqrt(np.maximum(square, np.finfo(np.float64).tiny)))

    def _score(self, setting: AxisSetting) -> np.ndarray:
        key = (setting.a, setting.rho)
        if key not in self._scores:
            score = self.fit.score(self.tower, *key)
            self._scores[key] = self.features @ score - self.fit.moments[self.tower].mean_safe @ score
        return self._scores[key]

    def _repel(self, rho: float) -> np.ndarray:
        """(n, axes): cumulative sums of the squared coordinates on the repelling axes."""
        if rho not in self._repelled:
            rows = self.fit.repelling(self.tower, rho)
            centred = self.features @ rows.T - rows @ self.fit.moments[self.tower].mean_safe
            self._repelled[rho] = np.cumsum(centred**2, axis=1)
        return self._repelled[rho]


def ranks(
    base: np.ndarray, queries: np.ndarray, gallery: np.ndarray, lengths: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Rank of the right gallery item for each query: the number of other items that are as similar or more.

    Args:
        base: (q, n) float32, similarities of the contents, not normalised.
        queries: (q, k) float64, columns of the queries.
        gallery: (n, k) float64, columns of the gallery's items.
        lengths: (n,) float64, lengths of the gallery's edited embeddings.
        right: (q,) int64, row of the gallery that is right for each query.

    Returns:
        (q,) int64; 0 is the first place.
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
