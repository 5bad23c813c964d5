"""The strength of a safety axis: what was tried, what each setting costs, what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisSetting:
    """Strength of the axis (docs/background/safety-axis.md section 3); lengths are in units of the tower's mean embedding.

    Attributes:
        g: Gain of the safety score on the axis that a tower scores on.
        o: Offset of the score: a mean safe input lies at ``g * o``, a mean unsafe one at ``g * (o - 1)``.
        kappa: Constant on the axis that the other tower scores on; with 0 unsafe items are only repelled.
        a: Share of the spread of safe inputs in the score's covariance; the rest is that of differences of pairs. 0 to 1.
        tau: How far unsafe images are redirected onto their safe counterparts; at least 0.
        rho: Ridge of the covariance, relative to its mean eigenvalue; above 0.
        axes: Repelling axes per tower, k.
        repel_image: Gain h of the image tower's repelling axes; with 0 it takes none.
        repel_text: The same for the text tower.
    """

    g: float
    o: float
    kappa: float
    a: float
    tau: float
    rho: float = 1e-2
    axes: int = 0
    repel_image: float = 0.0
    repel_text: float = 0.0


class FoldKind(StrEnum):
    """How items are held out of a fit: at random, or whole concepts at a time, as an unseen hazard is."""

    RANDOM = "random"
    CONCEPTS = "left-out-concepts"


class StrengthLimit(StrEnum):
    """What a strength may not cost."""

    PS = "PS"
    RETRIEVAL = "safe-retrieval"
    HARD_SAFE = "hard-safe-retrieval"
    ZERO_SHOT = "zero-shot"


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthLimits:
    """How much an edit may cost, points below the original; PS may not fall (docs/background/safety-axis.md section 5).

    Attributes:
        retrieval_loss: Of safe R@1, mean of both directions.
        hard_safe_loss: Of R@10 of the hard safe items, mean of both directions.
        zero_shot_loss: Of zero-shot top-1, mean over the sets.
        margin: Standard errors of the paired difference that a measured loss must stay below its limit.
    """

    retrieval_loss: float = 4.0
    hard_safe_loss: float = 8.0
    zero_shot_loss: float = 1.0
    margin: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthMetrics:
    """Percent, over all items, each measured by the fit that did not see it.

    Attributes:
        recall_at_1: Safe retrieval, mean of both directions.
        hard_safe_recall_at_10: The same at 10 for the hard safe items; None where no score tells which they are.
        zero_shot: Mean over the sets; None without a set.
    """

    gs: float
    ps: float
    p_ts: float
    p_tu: float
    p_vs: float
    p_vu: float
    recall_at_1: float
    hard_safe_recall_at_10: float | None
    zero_shot: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitUse:
    """How much of a limit a setting uses up.

    Attributes:
        folds: On which it was measured.
        loss: Points below the original; negative where it is above.
        margin: Points that are added to the loss for chance.
        at_most: The limit.
    """

    limit: StrengthLimit
    folds: FoldKind
    loss: float
    margin: float
    at_most: float

    @property
    def over(self) -> float:
        """Points over the limit; at most 0 where it is kept."""
        return self.loss + self.margin - self.at_most


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthCandidate:
    """One setting that was tried.

    Attributes:
        measured: By kind of fold.
        objective: What the settings that keep the limits are ordered by.
        keeps: Whether every limit is kept on every kind of fold.
        broken: The limit that is broken most; None where all are kept.
        tightest: The limit that is nearest to being broken, or is broken most.
    """

    setting: AxisSetting
    measured: Mapping[str, StrengthMetrics]
    objective: float
    keeps: bool
    broken: StrengthLimit | None
    tightest: LimitUse


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthChoice:
    """How the strength of an edit was chosen, from items that the fits did not see.

    Attributes:
        chosen: Position among the candidates; None when none of them keeps the limits.
        original: What the model before any step measures on the same items, by kind of fold.
        n: Items.
        hard_safe: Those of them that are hard safe; 0 where that is not measured.
        zero_shot_sets: Sets in the mean; none where zero-shot is not measured.
        concepts_left_out: Concepts that each fold leaves out; nothing with a single concept, then there are no such folds.
        seed: Of the random folds and of the candidates.
        seconds: Wall time.
    """

    candidates: tuple[StrengthCandidate, ...]
    chosen: int | None
    original: Mapping[str, StrengthMetrics]
    limits: StrengthLimits
    n: int
    hard_safe: int
    zero_shot_sets: tuple[str, ...]
    concepts_left_out: tuple[tuple[str, ...], ...]
    seed: int
    seconds: float
