"""Which entries are edited: the top of the score mass (method.md section 3, Eq. 11), or the top share of the entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uwm_deploy.errors import ContractError
from uwm_deploy.records.edit import Selection

_ROUNDING = 1e-12
"""Relative allowance for rounding: 0.29 * 100 is 28.999999999999996 and means 29."""


def selected_indices(score: Tensor, keep_mass: float, selection: Selection = Selection.ADAPTIVE) -> Tensor:
    """Entries to edit. Equal scores are ordered by flat index: of equals the later ones are selected first.

    Args:
        score: (out, in), any floating dtype, finite; not negative unless the selection is hard.
        keep_mass: Share of the score mass (adaptive) or of the entries (hard) that stays unedited, between 0 and 1.
        selection: `adaptive` or `hard`.

    Returns:
        (k,) int64, ascending flat indices, on the CPU.

    Raises:
        ContractError: If scores are not finite, are all zero, or are negative where they are masses.
    """
    flat = score.detach().flatten().cpu()
    if not bool(flat.isfinite().all()):
        raise ContractError("a layer's scores are not finite", fix="score again; check the calibration set")
    if not bool(flat.any()):
        raise ContractError("a layer's scores are all zero", fix="check that the layer is used by the tower")
    return _hard(flat, keep_mass) if selection is Selection.HARD else _adaptive(flat, keep_mass)


def entries_of_share(count: int, keep_mass: float) -> int:
    """Number of entries that a hard selection takes: all but ``floor(keep_mass * count)``, as in the official code."""
    return count - math.floor(keep_mass * count * (1 + _ROUNDING))


def _hard(flat: Tensor, keep_mass: float) -> Tensor:
    """Exactly `entries_of_share` of the highest scores."""
    wanted = entries_of_share(flat.numel(), keep_mass)
    if wanted == 0:
        return torch.empty(0, dtype=torch.int64)
    candidates = _tail(flat, wanted)
    order = torch.argsort(flat[candidates], stable=True)
    return candidates[order[-wanted:]].sort().values


def _adaptive(flat: Tensor, keep_mass: float) -> Tensor:
    """Entries whose cumulative mass, in ascending order of score, is above `keep_mass`.

    Decided in float64. Only the tail is ordered: an entry is selected when the mass of everything after it is below
    ``(1 - keep_mass)`` of the total.
    """
    if bool((flat < 0).any()):
        raise ContractError("a layer's scores are negative, so they are no masses", fix="use the selection hard")
    total = float(flat.sum(dtype=torch.float64))
    wanted = (1.0 - keep_mass) * total
    guess = max(64, int(2 * (1.0 - keep_mass) * flat.numel()))
    while True:
        candidates = _tail(flat, min(guess, flat.numel()))
        values = flat[candidates].double()
        if guess >= flat.numel() or float(values.sum()) > wanted:
            break
        guess *= 2
    order = torch.argsort(values, stable=True).flip(0)  # descending; among equals the later index first
    after = values[order].cumsum(0) - values[order]
    return candidates[order[after < wanted]].sort().values


def _tail(flat: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` largest values, and of all values equal to the smallest of these."""
    if count >= flat.numel():
        return torch.arange(flat.numel())
    threshold = torch.topk(flat, count, sorted=False).values.min()
    return (flat >= threshold).nonzero().flatten()
