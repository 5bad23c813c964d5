"""Scores of linear layers in closed form (method.md section 2, Eq. 8 to 10).

The mean of ``|W|`` over outputs cancels in the ratio of unsafe to safe, so a pair contributes a rank-one matrix:
``r[i] * c[j]``. Sums and counts are kept, so results do not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from uwm_deploy.records import Pairing, Rule, TowerName

STD_EPS = {TowerName.TEXT: 0.0, TowerName.IMAGE: 1e-8}
"""Added to standard deviations (method.md section 2)."""

GATHER_PAIRS = 32
"""Pairs gathered before the rank-B update, which reads and writes the whole score matrix whatever B is."""


def token_statistics(inputs: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Norm and spread of each input channel over the tokens of each sample.

    Two passes over the activations and no copy of them when every token counts: this is what scoring costs.

    Args:
        inputs: (B, T, in) input activations of a linear layer.
        valid: (B, T) bool, or None when all tokens count.

    Returns:
        L2 norms (B, in) and unbiased standard deviations (B, in), float32. A sample with one token has NaN spread.
    """
    if valid is None:
        count: Tensor | float = float(inputs.shape[1])
        ones = inputs.new_ones(1, 1, inputs.shape[1]).expand(inputs.shape[0], -1, -1)
        sums = torch.bmm(ones, inputs).squeeze(1)
    else:
        mask = valid.to(inputs.dtype)
        inputs = inputs * mask[..., None]
        count = mask.sum(1, keepdim=True).double()
        sums = inputs.sum(1)
    norms = torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float32)
    # Float64 here: n^2 - T mean^2 cancels in channels whose mean is large. These arrays are small.
    square, mean = norms.double().square(), sums.double() / count
    variance = (square - count * mean.square()).clamp_min(0) / (count - 1)
    return norms, variance.sqrt().float()


@dataclass(slots=True)
class LayerScorer:
    """Running score of one layer.

    Attributes:
        weight: (out, in); only its absolute value is used.
        rule: Whether the final score is multiplied by ``|W|``.
        eps: Added to standard deviations.
        left_out: Called with the batch's positions of pairs that are not finite.
    """

    weight: Tensor
    rule: Rule
    pairing: Pairing
    eps: float
    left_out: Callable[[list[str]], None]
    count: int = 0
    calls: int = 0
    _sums: list[Tensor] = field(default_factory=list)
    _safe: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _unsafe: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _ids: list[str] = field(default_factory=list)

    def add(self, inputs: Tensor, valid: Tensor | None, ids: tuple[str, ...]) -> None:
        """Takes a batch whose first half is the safe side and whose second half is the unsafe side, pair by pair.

        Args:
            inputs: (2b, T, in).
            valid: (2b, T) bool or None.
            ids: b ids.
        """
        self.calls += 1
        norms, spreads = token_statistics(inputs, valid)
        half = len(ids)
        self._safe.append((norms[:half], spreads[:half] + self.eps))
        self._unsafe.append((norms[half:], spreads[half:] + self.eps))
        self._ids.extend(ids)
        if len(self._ids) >= GATHER_PAIRS:
            self.flush()

    @torch.inference_mode()
    def flush(self) -> None:
        """Adds the gathered pairs to the sum."""
        if not self._ids:
            return
        safe_norm, safe_std = (torch.cat(parts) for parts in zip(*self._safe, strict=True))
        unsafe_norm, unsafe_std = (torch.cat(parts) for parts in zip(*self._unsafe, strict=True))
        magnitude = self.weight.detach().abs().float()
        safe_rows, unsafe_rows = safe_norm @ magnitude.T, unsafe_norm @ magnitude.T
        del magnitude
        if self.pairing is Pairing.MEAN_OF_RATIOS:
            columns = (unsafe_norm * safe_std) / (safe_norm * unsafe_std)
            self._accumulate([(unsafe_rows / safe_rows, columns)])
        else:
            self._accumulate([(unsafe_rows, unsafe_norm / unsafe_std), (safe_rows, safe_norm / safe_std)])
        self._safe, self._unsafe, self._ids = [], [], []

    def _accumulate(self, factors: list[tuple[Tensor, Tensor]]) -> None:
        """Adds ``rows^T @ columns`` of the finite pairs; a pair never poisons the sum."""
        finite = torch.stack([rows.isfinite().all(1) & columns.isfinite().all(1) for rows, columns in factors]).all(0)
        if not bool(finite.all()):
            self.left_out([self._ids[i] for i in (~finite).nonzero().flatten().tolist()])
            factors = [(rows[finite], columns[finite]) for rows, columns in factors]
        self.count += int(finite.sum())
        if not self._sums:
            self._sums = [torch.zeros(self.weight.shape, device=self.weight.device) for _ in factors]
        for total, (rows, columns) in zip(self._sums, factors, strict=True):
            total.addmm_(rows.T, columns)

    @torch.inference_mode()
    def score(self) -> Tensor:
        """Final score (out, in), float32; ends the scorer, whose sums it takes over."""
        self.flush()
        if self.pairing is Pairing.MEAN_OF_RATIOS:
            (total,) = self._sums
            score = total.div_(max(1, self.count))
        else:
            unsafe, safe = self._sums
            score = unsafe.div_(safe)
        self._sums = []
        if self.rule is Rule.RATIO_TIMES_ABS_WEIGHT:
            score.mul_(self.weight.detach().abs())
        return score
