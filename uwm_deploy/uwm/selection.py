"""Adaptive selection of the entries that carry the top of the score mass (method.md section 3, Eq. 11)."""

from __future__ import annotations

import torch
from torch import Tensor

from uwm_deploy.errors import ContractError


def selected_indices(score: Tensor, keep_mass: float) -> Tensor:
    """Entries whose cumulative mass, in ascending order of score, is above `keep_mass`.

    Decided in float64. Only the tail is ordered: an entry is selected when the mass of everything after it is below
    ``(1 - keep_mass)`` of the total. Equal scores are ordered by flat index.

    Args:
        score: (out, in), finite and not negative.
        keep_mass: Share that is left as it is, between 0 and 1.

    Returns:
        Ascending flat indices, int64, on the CPU.

    Raises:
        ContractError: If scores are not finite, negative, or all zero.
    """
    flat = score.detach().flatten().cpu()
    if not bool(flat.isfinite().all()) or bool((flat < 0).any()):
        raise ContractError(
            "a layer's scores are not finite and positive", fix="score again; check the calibration set"
        )
    total = float(flat.sum(dtype=torch.float64))
    if total <= 0:
        raise ContractError("a layer's scores are all zero", fix="check that the layer is used by the tower")
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
    """Ascending indices of at least the `count` largest values, all equals of the smallest of them included."""
    if count >= flat.numel():
        return torch.arange(flat.numel())
    threshold = torch.topk(flat, count, sorted=False).values.min()
    return (flat >= threshold).nonzero().flatten()
