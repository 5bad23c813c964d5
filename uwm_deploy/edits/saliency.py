"""Scores of linear layers in closed form (method.md section 2, Eq. 8 to 10).

The mean of ``|W|`` over outputs cancels in the ratio of unsafe to safe, so a pair contributes a rank-one matrix:
``r[i] * c[j]``. Sums and counts are kept, so results do not depend on the batch size. Where nothing cancels
(`unsafe-only`, `difference`) a side of a pair is rank one as well; the mean of ``|W|`` is multiplied in once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from uwm_deploy.records.edit import Pairing, Rule
from uwm_deploy.records.model import TowerName

STD_EPS = {TowerName.TEXT: 0.0, TowerName.IMAGE: 1e-8}
"""Added to standard deviations (method.md section 2)."""

GATHER_PAIRS = 32
"""Pairs in one rank-B update, which reads and writes the whole score matrix whatever B is."""

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
"""Size of the buffer that squares are computed in: a CPU's cache holds it, and it keeps a GPU busy."""


def token_statistics(inputs: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Norm and spread of each input channel over the tokens of each sample.

    Sums over tokens are matrix products with the mask, an order of magnitude faster on a CPU than a reduction of the
    middle axis. Distances from the mean are squared, in one small buffer: a large mean then cancels no digits.

    Args:
        inputs: (B, T, in), any floating dtype, input activations of a linear layer.
        valid: (B, T) bool, or None when all tokens count.

    Returns:
        L2 norms (B, in) and unbiased standard deviations (B, in), float32. A sample with one token has NaN spread.
    """
    samples, tokens, channels = inputs.shape
    mask = torch.ones(1, 1, tokens, device=inputs.device) if valid is None else valid.float()[:, None]
    mask = mask.expand(samples, 1, tokens)
    count = mask.sum(2)
    means, squares = inputs.new_empty((2, samples, 1, channels), dtype=torch.float32)
    limit = CHUNK_BYTES.get(inputs.device.type, CHUNK_BYTES["cuda"])
    step = min(samples, max(1, limit // (4 * tokens * channels)))
    buffer = inputs.new_empty((step, tokens, channels), dtype=torch.float32)
    for start in range(0, samples, step):
        rows = slice(start, start + step)
        chunk, weights, mean = inputs[rows].float(), mask[rows], means[rows]
        torch.bmm(weights, chunk, out=mean)
        mean /= count[rows, :, None]
        distances = torch.sub(chunk, mean, out=buffer[: len(chunk)])
        torch.bmm(weights, distances.square_(), out=squares[rows])
    means, squares = means[:, 0], squares[:, 0]
    return (squares + count * means.square()).sqrt(), (squares / (count - 1)).sqrt()


@dataclass(slots=True)
class LayerScorer:
    """Running score of one layer.

    The statistics of a forward pass are only kept at first; `settle` adds them to the sums. A pass that ran out of memory
    halfway is forgotten with `undo` and repeated, so that no pair counts twice.

    Attributes:
        weight: (out, in), any floating dtype; only its absolute value is used.
        rule: Whether the final score is multiplied by ``|W|``.
        pairing: How both sides of a pair become its score.
        eps: Number that is added to standard deviations.
        left_out: Called with the ids of the pairs whose statistics are not finite.
        count: Number of pairs in the sums.
        calls: Number of batches that reached the layer.
    """

    weight: Tensor
    rule: Rule
    pairing: Pairing
    eps: float
    left_out: Callable[[list[str]], None]
    count: int = 0
    calls: int = 0
    _sums: list[Tensor] = field(default_factory=list)
    _new: list[_Pairs] = field(default_factory=list)
    _gathered: list[_Pairs] = field(default_factory=list)

    def add(self, inputs: Tensor, valid: Tensor | None, ids: tuple[str, ...]) -> None:
        """Takes a batch whose first half is the safe side and whose second half is the unsafe side, pair by pair.

        Args:
            inputs: (2b, T, in), any floating dtype, input activations of the layer.
            valid: (2b, T) bool, the tokens that count; None when all do.
            ids: Ids of the b pairs.
        """
        self.calls += 1
        norms, spreads = token_statistics(inputs, valid)
        spreads += self.eps
        half = len(ids)
        self._new.append(_Pairs(ids, norms[:half], spreads[:half], norms[half:], spreads[half:]))

    def undo(self) -> None:
        """Forgets the statistics since the last `settle`."""
        self._new = []

    def settle(self) -> None:
        """Keeps the statistics since the last call, and adds them to the sums when `GATHER_PAIRS` have gathered."""
        self._gathered += self._new
        self._new = []
        if sum(len(pairs.ids) for pairs in self._gathered) >= GATHER_PAIRS:
            self.flush()

    @torch.inference_mode()
    def flush(self) -> None:
        """Adds all kept statistics to the sums."""
        self._gathered += self._new
        self._new = []
        if not self._gathered:
            return
        ids = [item for pairs in self._gathered for item in pairs.ids]
        safe_norm, safe_std, unsafe_norm, unsafe_std = (
            torch.cat(parts) for parts in list(zip(*self._gathered, strict=True))[1:]
        )
        magnitude = self.weight.detach().abs().float()
        safe_rows, unsafe_rows = safe_norm @ magnitude.T, unsafe_norm @ magnitude.T
        del magnitude
        if self.pairing is Pairing.MEAN_OF_RATIOS:
            columns = (unsafe_norm * safe_std) / (safe_norm * unsafe_std)
            self._accumulate(ids, [(unsafe_rows / safe_rows, columns)])
        elif self.pairing is Pairing.UNSAFE_ONLY:
            self._accumulate(ids, [(unsafe_rows, unsafe_norm / unsafe_std)])
        else:
            self._accumulate(ids, [(unsafe_rows, unsafe_norm / unsafe_std), (safe_rows, safe_norm / safe_std)])
        self._gathered = []

    def _accumulate(self, ids: list[str], factors: list[tuple[Tensor, Tensor]]) -> None:
        """Adds ``rows^T @ columns`` of the finite pairs; the others are left out, so that no NaN gets into a sum."""
        finite = torch.stack([rows.isfinite().all(1) & columns.isfinite().all(1) for rows, columns in factors]).all(0)
        left_out = [] if bool(finite.all()) else [ids[i] for i in (~finite).nonzero().flatten().tolist()]
        if left_out:
            factors = [(rows[finite], columns[finite]) for rows, columns in factors]
        for total, (rows, columns) in zip(self._totals(), factors, strict=True):
            total.addmm_(rows.T, columns)
        self.count += len(ids) - len(left_out)
        if left_out:
            self.left_out(left_out)

    def _totals(self) -> list[Tensor]:
        if not self._sums:
            sides = 1 if self.pairing in (Pairing.MEAN_OF_RATIOS, Pairing.UNSAFE_ONLY) else 2
            self._sums = [torch.zeros(self.weight.shape, device=self.weight.device) for _ in range(sides)]
        return self._sums

    @torch.inference_mode()
    def take_sums(self) -> list[Tensor]:
        """Takes out the sums, (out, in) float32 each: one or two, depending on the pairing. Ends the scorer."""
        self.flush()
        sums, self._sums = self._totals(), []
        return sums

    def score(self) -> Tensor:
        """Takes out the final score, (out, in) float32. Ends the scorer."""
        return score_from_sums(self.take_sums(), self.count, self.weight, self.rule, self.pairing)


class _Pairs(NamedTuple):
    """Statistics of b pairs: their ids, and norms and standard deviations (b, in) float32 of both sides."""

    ids: tuple[str, ...]
    safe_norm: Tensor
    safe_std: Tensor
    unsafe_norm: Tensor
    unsafe_std: Tensor


@torch.inference_mode()
def score_from_sums(sums: Sequence[Tensor], count: int, weight: Tensor, rule: Rule, pairing: Pairing) -> Tensor:
    """Final score of a layer, in the memory of the first sum.

    Args:
        sums: (out, in) float32 each, from one or more `LayerScorer.take_sums`, added up.
        count: Number of pairs in them.
        weight: (out, in), any floating dtype.
        rule: See `LayerScorer`.
        pairing: See `LayerScorer`.

    Returns:
        (out, in) float32.
    """
    score, *others = sums
    if pairing is Pairing.MEAN_OF_RATIOS:
        score.div_(max(1, count))
    elif pairing is Pairing.RATIO_OF_MEANS:
        score.div_(others[0])
    else:
        if pairing is Pairing.DIFFERENCE:
            score.sub_(others[0])
        # Sums of ``r[i] * c[j]`` to means of Phi: the rows' mean over inputs, and the mean of ``|W|`` over outputs.
        score.mul_(weight.detach().abs().float().mean(0)).div_(max(1, count) * weight.shape[1])
    if rule is Rule.RATIO_TIMES_ABS_WEIGHT:
        score.mul_(weight.detach().abs())
    return score
