"""Placement `weights`: a map is folded into the model's projection and bias (docs/background/safety-axis.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uwm_deploy.edits.axis import AffineMap
from uwm_deploy.errors import InputError

GAMMA_SHARE_MIN = 1e-6
"""Smallest absolute entry of gamma that can carry the constant, relative to the largest."""

RESIDUAL_MAX = 1e-6
"""Largest part of the constant that may be missing after the fold, relative to the constant's length."""

_ELSEWHERE = "use the placement embedding"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedNorm:
    """Replacement of a bias-free projection and of the bias of the LayerNorm before it.

    Attributes:
        weight: (d, m) float64, W''.
        norm_bias: (m,) float64, beta''.
        residual: Part of the constant that is missing, relative to its length; at most `RESIDUAL_MAX`.
    """

    weight: np.ndarray
    norm_bias: np.ndarray
    residual: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedBias:
    """Replacement of a projection that has a bias.

    Attributes:
        weight: (d, m) float64.
        bias: (d,) float64.
    """

    weight: np.ndarray
    bias: np.ndarray


def folded_into_norm(wanted: AffineMap, gamma: np.ndarray, beta: np.ndarray, carrier: np.ndarray) -> FoldedNorm:
    """Folds a map into a bias-free projection and the LayerNorm directly before it; exact on every output of the LayerNorm.

    A LayerNorm's output is ``gamma * xhat + beta`` with ``sum(xhat) = 0``, so ``p = (1/gamma) / ||1/gamma||`` has the same
    product with all outputs, and ``W'' = A + q p'`` can carry a constant along q.

    Args:
        wanted: The map (A, c) of the LayerNorm's output.
        gamma: (m,), any floating dtype, the LayerNorm's weight.
        beta: (m,), any floating dtype, the LayerNorm's bias.
        carrier: (d,), any floating dtype, q: the axis that the other tower scores on, `AxisMaps.constant_axis`.

    Raises:
        InputError: If an entry of gamma is (nearly) zero, or no bias gives the constant.
    """
    gamma, beta, carrier = (part.astype(np.float64) for part in (gamma, beta, carrier))
    constant_direction = _constant_direction(gamma)
    weight = wanted.weight + np.outer(carrier, constant_direction)
    missing = wanted.bias - carrier * float(constant_direction @ beta)
    shift: np.ndarray = np.linalg.lstsq(weight, missing, rcond=None)[0]
    residual = _relative(float(np.linalg.norm(weight @ shift - missing)), float(np.linalg.norm(missing)))
    if not residual <= RESIDUAL_MAX:
        raise InputError(
            f"no LayerNorm bias gives the constant of the edit: {residual:.2g} of it is missing", fix=_ELSEWHERE
        )
    return FoldedNorm(weight=weight, norm_bias=beta + shift, residual=residual)


def with_one(rows: np.ndarray) -> np.ndarray:
    """Inputs of a projection that has a bias, each with a constant 1 behind it; the edit is fitted on these.

    Args:
        rows: (n, m), any floating dtype.

    Returns:
        (n, m + 1), dtype of the rows.
    """
    return np.concatenate([rows, np.ones((len(rows), 1), rows.dtype)], axis=1)


def with_bias(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A projection and its bias as one weight of the rows that `with_one` gives.

    Args:
        weight: (d, m), any floating dtype.
        bias: (d,), the same dtype.

    Returns:
        (d, m + 1), the same dtype.
    """
    return np.concatenate([weight, bias[:, None]], axis=1)


def folded_into_bias(wanted: AffineMap) -> FoldedBias:
    """Folds a map into a projection that has a bias, to which the constant is added; always exact.

    Args:
        wanted: The map (A, c), fitted on `with_one` features and `with_bias` weights.
    """
    return FoldedBias(weight=wanted.weight[:, :-1], bias=wanted.weight[:, -1] + wanted.bias)


def _constant_direction(gamma: np.ndarray) -> np.ndarray:
    """Vector p (m,), of length 1."""
    size = np.abs(gamma)
    if not np.isfinite(gamma).all() or not size.min() > GAMMA_SHARE_MIN * size.max():
        raise InputError(
            f"the final LayerNorm has a weight of {size.min():.2g} beside one of {size.max():.2g}", fix=_ELSEWHERE
        )
    inverse = 1 / gamma
    result: np.ndarray = inverse / np.linalg.norm(inverse)
    return result


def _relative(part: float, whole: float) -> float:
    return part / whole if whole > 0 else part
