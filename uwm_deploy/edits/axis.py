"""The safety axis: a closed-form edit of the last linear map of both towers (docs/background/safety-axis.md section 3).

Everything is float64 and computed from sums (`Moments`). Each part of the formula is a function of its own, because the
choice of the strength combines few parts into many settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from uwm_deploy.edits.eigen import least_eigenvectors, signed, top_eigenvectors
from uwm_deploy.edits.moments import Moments
from uwm_deploy.errors import DataError, InputError
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting

REDIRECT_RIDGE = 1e-2
"""lambda of the redirect, relative to the mean square of a feature."""

SCORE_AXIS = {TowerName.IMAGE: 0, TowerName.TEXT: 1}
"""Column of the spare axes that holds a tower's score; the other tower has its constant in the same column."""


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """``x -> weight x + bias``.

    Attributes:
        weight: (d, m) float64.
        bias: (d,) float64.
    """

    weight: np.ndarray
    bias: np.ndarray

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Maps rows.

        Args:
            rows: (n, m), any floating dtype.

        Returns:
            (n, d) float64, not normalised.
        """
        result: np.ndarray = rows.astype(np.float64) @ self.weight.T + self.bias
        return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AxisMaps:
    """The edit of both towers.

    Attributes:
        maps: Pooled feature to embedding before normalisation, per tower.
        spare: (d, s) float64, orthonormal columns: u1, u2, then the repelling axes of the image tower, then of the text
            tower.
    """

    maps: Mapping[TowerName, AffineMap]
    spare: np.ndarray

    def constant_axis(self, tower: TowerName) -> np.ndarray:
        """Axis that the other tower scores on, (d,) float64, length 1; the constant is folded along it (section 4)."""
        return self.spare[:, 1 - SCORE_AXIS[tower]]


def require_valid(setting: AxisSetting, embed_dim: int | None = None) -> None:
    """Refuses a setting that has no meaning.

    Args:
        setting: What is checked.
        embed_dim: Dimensions of the joint space, d; None when they are not known yet.

    Raises:
        InputError: If a value is not finite or out of its range, or there are not enough dimensions for the axes.
    """
    values = {name: float(getattr(setting, name)) for name in _NUMBERS}
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"axis setting {name} is {value}", fix="give a finite number")
        if abs(value) > LARGEST and name != "axes":
            raise InputError(f"axis setting {name} is {value:g}", fix=f"give a number of at most {LARGEST:g}")
    if bool(setting.axes) != bool(setting.repel_image or setting.repel_text):
        missing = "repel_image or repel_text" if setting.axes else "axes"
        raise InputError(f"the axis setting has repelling axes without {missing}", fix="give both or neither")
    if not 0 <= setting.a <= 1:
        raise InputError(f"axis setting a is {setting.a}", fix="give a number from 0 to 1")
    if setting.tau < 0:
        raise InputError(f"axis setting tau is {setting.tau}", fix="give 0 or more")
    if setting.rho <= 0:
        raise InputError(f"axis setting rho is {setting.rho}", fix="give a number above 0, such as 0.01")
    if setting.axes < 0 or setting.axes != int(setting.axes):
        raise InputError(f"axis setting axes is {setting.axes}", fix="give a whole number of axes, 0 or more")
    if embed_dim is not None and spare_count(setting) >= embed_dim:
        raise InputError(
            f"{spare_count(setting)} spare axes do not fit into {embed_dim} dimensions", fix="lower the setting axes"
        )


LARGEST = 100.0
"""Largest absolute value of a number in a setting; useful ones are below 2, and far above this float32 overflows."""

_NUMBERS = ("g", "o", "kappa", "a", "tau", "rho", "axes", "repel_image", "repel_text")


def repel_of(setting: AxisSetting, tower: TowerName) -> float:
    """Gain h of a tower's repelling axes."""
    return setting.repel_image if tower is TowerName.IMAGE else setting.repel_text


def axes_of(setting: AxisSetting, tower: TowerName) -> int:
    """Repelling axes that a tower takes: k, or none when its gain is 0."""
    return setting.axes if repel_of(setting, tower) else 0


def spare_count(setting: AxisSetting) -> int:
    """Spare axes that a setting takes: u1, u2 and the repelling ones of both towers."""
    return 2 + sum(axes_of(setting, tower) for tower in TowerName)


def repel_columns(setting: AxisSetting, tower: TowerName) -> slice:
    """Columns of the spare axes that are a tower's repelling ones: the image tower's come first."""
    start = 2 if tower is TowerName.IMAGE else 2 + axes_of(setting, TowerName.IMAGE)
    return slice(start, start + axes_of(setting, tower))


def score_direction(moments: Moments, a: float, rho: float) -> np.ndarray:
    """Vector w of the score ``r(x) = w'(x - mu_s)``: 0 on the mean safe input, -1 on the mean unsafe one (formula 1).

    Args:
        moments: Of the pooled features.
        a: Weight of Cov(x_s) against Cov(x_s - x_u), from 0 to 1.
        rho: Ridge, relative to the mean variance of a feature.

    Returns:
        (m,) float64.

    Raises:
        DataError: If there are fewer than two pairs, or safe and unsafe inputs have the same mean.
    """
    moments.require_pairs()
    delta = moments.mean_safe - moments.mean_unsafe
    spread = (1 - a) * moments.covariance_difference + a * moments.covariance_safe
    solved = np.linalg.solve(ridged(spread, rho), delta)
    separation = float(delta @ solved)
    if not separation > 0:
        raise DataError("safe and unsafe features have the same mean", fix="check that the pairs differ")
    result: np.ndarray = solved / separation
    return result


def ridged(covariance: np.ndarray, rho: float) -> np.ndarray:
    """A covariance with its ridge, ``S + rho tr(S)/m I``.

    Args:
        covariance: (m, m) float64, symmetric.
        rho: Ridge, relative to the mean variance of a feature.

    Returns:
        (m, m) float64.

    Raises:
        DataError: If no feature varies.
    """
    ridge = rho * float(np.trace(covariance)) / len(covariance)
    if not ridge > 0:
        raise DataError("the features do not vary", fix="check that the pairs differ")
    result: np.ndarray = covariance + ridge * np.eye(len(covariance))
    return result


def spare_axes(moments: Mapping[TowerName, Moments], weights: Mapping[TowerName, np.ndarray], count: int) -> np.ndarray:
    """Eigenvectors of least eigenvalue of ``M = sum of mean(e e') / n`` over safe and unsafe images and texts (formula 2).

    Args:
        moments: Of the pooled features, per tower.
        weights: (d, m) float64 per tower, the last linear map.
        count: Number of axes.

    Returns:
        (d, count) float64, orthonormal columns.
    """
    parts = [moments[tower].mean_outer_products(weights[tower]) / _length(moments[tower]) for tower in TowerName]
    return least_eigenvectors(np.sum(parts, axis=0), count)


def redirect(moments: Moments, weight: np.ndarray) -> AffineMap:
    """D of ``B_v = W + tau D``: moves unsafe inputs onto their safe counterparts and safe ones nowhere (formula 4).

    Means are over all 2n inputs, and the constant has no ridge. The solution is linear in tau; this is the one of tau = 1.

    Args:
        moments: Of the image tower.
        weight: (d, m) float64, W.
    """
    moments.require_pairs()
    covariance, centre = moments.covariance_both, moments.mean_both
    square = float(np.trace(moments.gram_safe + moments.gram_unsafe)) / (2 * moments.count * moments.size)
    target = (moments.mean_safe - moments.mean_unsafe) / 2
    cross = (moments.gram_cross - moments.gram_unsafe) / (2 * moments.count) - np.outer(target, centre)
    solved = np.linalg.solve(covariance + REDIRECT_RIDGE * square * np.eye(moments.size), cross.T).T
    return AffineMap(weight @ solved, weight @ (target - solved @ centre))


def repelling_rows(moments: Moments, count: int, rho: float) -> np.ndarray:
    """Rows R, the top solutions of ``N r = l S r`` with ``R S R' = I`` (formula 5).

    N is the mean of (x_u - x_s)(x_u - x_s)', S = Cov(x_s) with its ridge.

    Args:
        moments: Of the pooled features.
        count: Number of repelling axes.
        rho: Ridge, relative to the mean variance of a feature.

    Returns:
        (count, m) float64.

    Raises:
        InputError: If there are fewer features than axes.
    """
    if count > moments.size:
        raise InputError(f"{count} repelling axes of {moments.size} features", fix="lower the setting axes")
    moments.require_pairs()
    factor = np.linalg.cholesky(ridged(moments.covariance_safe, rho))
    halfway = np.linalg.solve(factor, moments.gram_difference / moments.count)
    whitened = np.linalg.solve(factor, halfway.T)
    directions = top_eigenvectors((whitened + whitened.T) / 2, count)
    return signed(np.linalg.solve(factor.T, directions)).T


def maps_of(
    moments: Mapping[TowerName, Moments], weights: Mapping[TowerName, np.ndarray], setting: AxisSetting
) -> AxisMaps:
    """Fits the edit of both towers.

    For the placement `embedding`, x is the normalised embedding and every weight the identity.

    Args:
        moments: Of the pooled features, per tower.
        weights: (d, m), any floating dtype, per tower: the last linear map.
        setting: Strength.

    Raises:
        InputError: If the setting has no meaning, a tower is missing, or the data cannot be fitted.
    """
    weights = {tower: weight.astype(np.float64) for tower, weight in weights.items()}
    embed_dim = _require_towers(moments, weights)
    require_valid(setting, embed_dim)
    spare = spare_axes(moments, weights, spare_count(setting))
    maps = {tower: _tower_map(tower, moments[tower], weights[tower], spare, setting) for tower in TowerName}
    return AxisMaps(maps=maps, spare=spare)


def _tower_map(
    tower: TowerName, moments: Moments, weight: np.ndarray, spare: np.ndarray, setting: AxisSetting
) -> AffineMap:
    """Formula 3, with the redirect of formula 4 and the repelling axes of formula 5."""
    content = _content(tower, moments, weight, setting.tau)
    length, mean = _length(moments), moments.mean_safe
    score = score_direction(moments, setting.a, setting.rho)
    own, other = spare[:, SCORE_AXIS[tower]], spare[:, 1 - SCORE_AXIS[tower]]
    matrix = content.weight - spare @ (spare.T @ content.weight) + np.outer(own, setting.g * length * score)
    bias = content.bias - spare @ (spare.T @ content.bias) + other * (setting.kappa * length)
    bias = bias + own * (setting.g * length * (setting.o - float(score @ mean)))
    if axes_of(setting, tower):
        gain = repel_of(setting, tower) * length / math.sqrt(setting.axes)
        rows = gain * spare[:, repel_columns(setting, tower)] @ repelling_rows(moments, setting.axes, setting.rho)
        matrix, bias = matrix + rows, bias - rows @ mean
    return AffineMap(matrix, bias)


def _content(tower: TowerName, moments: Moments, weight: np.ndarray, tau: float) -> AffineMap:
    """Linear map of a tower's content: B_v for images, W for texts. A redirect of texts would make them tie (section 7)."""
    if tower is TowerName.TEXT or not tau:
        return AffineMap(weight, np.zeros(len(weight)))
    step = redirect(moments, weight)
    return AffineMap(weight + tau * step.weight, tau * step.bias)


def _length(moments: Moments) -> float:
    if not moments.mean_length > 0:
        raise DataError("safe embeddings have no length", fix="check the model: its embeddings are zero")
    return moments.mean_length


def _require_towers(moments: Mapping[TowerName, Moments], weights: Mapping[TowerName, np.ndarray]) -> int:
    """Dimensions of the joint space.

    Raises:
        InputError: If a tower is missing, or shapes do not fit.
    """
    for tower in TowerName:
        if tower not in moments or tower not in weights:
            raise InputError(f"the {tower} tower is missing", fix="fit both towers: the edit of one alone does nothing")
        if weights[tower].ndim != 2 or weights[tower].shape[1] != moments[tower].size:
            raise InputError(
                f"the {tower} tower has {moments[tower].size} features, its weight the shape {weights[tower].shape}",
                fix="take moments of the inputs of this weight",
            )
    sizes = {len(weights[tower]) for tower in TowerName}
    if len(sizes) > 1:
        raise InputError(f"the towers end in spaces of {sorted(sizes)} dimensions", fix="use the towers of one model")
    return sizes.pop()
