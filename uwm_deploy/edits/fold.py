"""Placement `weights`: a map becomes the projection and a bias that are there already (docs/safety-axis.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uwm_deploy.edits.axis import AffineMap
from uwm_deploy.errors import InputError

GAMMA_SHARE_MIN = 1e-6
"""Least entry of gamma that can carry the constant, relative to the largest."""

RESIDUAL_MAX = 1e-6
"""Of the constant, relative to its length: what may be missing after the fold."""

_ELSEWHERE = "use the placement embedding"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedNorm:
    """What replaces a bias-free projection and the bias of the LayerNorm before it.

    Attributes:
        weight: (d, m) float64, W''.
        norm_bias: (m,) float64, beta''.
        residual: Of the constant, relative to its length; at most `RESIDUAL_MAX`.
    """

    weight: np.ndarray
    norm_bias: np.ndarray
    residual: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedBias:
    """What replaces a projection that has a bias.

    Attributes:
        weight: (d, m) float64.
        bias: (d,) float64.
    """

    weight: np.ndarray
    bias: np.ndarray


def folded_into_norm(wanted: AffineMap, gamma: np.ndarray, beta: np.ndarray, carrier: np.ndarray) -> FoldedNorm:
    """Folds a map into a bias-free projection and the LayerNorm directly before it; exact on every output of that.

    A LayerNorm's output is ``gamma * xhat + beta`` with ``sum(xhat) = 0``, so ``p = (1/gamma) / ||1/gamma||`` has the same
    product with all of them, and ``W'' = A + q p'`` can carry a constant along q.

    Args:
        wanted: The map (A, c) of that output.
        gamma: (m,), the LayerNorm's weight.
        beta: (m,), its bias.
        carrier: (d,), q: the axis that the other tower scores on, `AxisMaps.constant_axis`.

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
    """(n, m + 1): the inputs of a projection that has a bias, each with a constant 1, as the edit is fitted on."""
    return np.concatenate([rows, np.ones((len(rows), 1), rows.dtype)], axis=1)


def with_bias(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(d, m + 1): a projection (d, m) and its bias (d,) as one weight of what `with_one` gives."""
    return np.concatenate([weight, bias[:, None]], axis=1)


def folded_into_bias(wanted: AffineMap) -> FoldedBias:
    """Folds a map into a projection that has a bias: the constant is simply added there; always exact.

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
