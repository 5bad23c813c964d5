"""LEACE for one binary label, the baseline of the closed-form edits: the least change after which no linear probe finds it.

Belrose et al. 2023, theorem 4.3: among all affine maps after which x has no covariance with the label z, the one with least
mean ||x' - x||^2 is ``x' = x - S^+/2 P S^-/2 (x - mu)``, P the orthogonal projector onto ``S^-/2 Cov(x, z)``. For one binary
label with equal counts Cov(x, z) is a multiple of ``d = mu_s - mu_u``, and the formula becomes

    x' = x - d a'(x - mu),  a = S^-1 d / (d' S^-1 d)

with S and mu over safe and unsafe inputs together; inverses are pseudo-inverses.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from uwm_deploy.edits.axis import AffineMap
from uwm_deploy.edits.eigen import NULL_SHARE
from uwm_deploy.edits.moments import Moments
from uwm_deploy.errors import DataError
from uwm_deploy.records.model import TowerName


def eraser(moments: Moments) -> AffineMap:
    """The eraser on pooled features, weight (m, m) and bias (m,).

    Raises:
        DataError: If there are fewer than two pairs, or safe and unsafe inputs have the same mean.
    """
    moments.require_pairs()
    delta, centre = moments.mean_safe - moments.mean_unsafe, moments.mean_both
    # delta lies in the range of S, so a pseudo-inverse loses nothing.
    solved = np.linalg.pinv(moments.covariance_both, rcond=NULL_SHARE, hermitian=True) @ delta
    separation = float(delta @ solved)
    if not separation > 0:
        raise DataError("safe and unsafe features have the same mean", fix="there is nothing to erase")
    direction = solved / separation
    return AffineMap(np.eye(moments.size) - np.outer(delta, direction), delta * float(direction @ centre))


def leace_maps(
    moments: Mapping[TowerName, Moments], weights: Mapping[TowerName, np.ndarray]
) -> dict[TowerName, AffineMap]:
    """Map per tower from pooled features to embeddings of the erased features: ``e' = W x'``.

    Args:
        moments: Of the pooled features, per tower.
        weights: (d, m), any floating dtype, per tower: the last linear map W.
    """
    erased = {tower: eraser(part) for tower, part in moments.items()}
    return {
        tower: AffineMap(weights[tower].astype(np.float64) @ part.weight, weights[tower] @ part.bias)
        for tower, part in erased.items()
    }
