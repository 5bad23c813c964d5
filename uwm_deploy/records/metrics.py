"""What is measured on an evaluation set: decisions, retrieval, zero-shot, risk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.shape import LATER

_ALL = 100 + 1e-6
"""Percent, with room for rounding."""


PREFERENCE = frozenset(("P_ts", "P_tu", "P_vs", "P_vu", "Txt_s", "Img_s", "PS", "PU", "GS"))
"""Names of the SafeGround metrics."""


def _refuse_unless(possible: bool, what: str) -> None:
    if not possible:
        raise IntegrityError(f"there is no such number as {what}", fix="restore the file or build again")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proportion:
    """A mean of booleans with its uncertainty; percentages, so 0 to 100.

    Attributes:
        value: Percentage of items that are true.
        n: Items.
        ties: Items that are decided by an exact tie, always for the worse: false, or *unsafe first*.
        low: Lower end of the 95% Wilson interval.
        high: Upper end.
        clusters: Groups of items without a shared picture or caption, which the interval counts; 0 where nobody looked.
    """

    value: float
    n: int
    low: float
    high: float
    ties: int = 0
    clusters: int = field(default=0, metadata=LATER)

    def __post_init__(self) -> None:
        """Refuses what is no share: a file may say anything, and the gate computes with it."""
        ends = (self.low, self.value, self.high)
        _refuse_unless(all(0 <= end <= _ALL for end in ends), f"a share of {self.value:g}%")
        _refuse_unless(self.n >= 1 and min(self.ties, self.clusters) >= 0, f"a share of {self.n} items")

    @property
    def independent(self) -> int:
        """Number that the interval comes from."""
        return self.clusters or self.n


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """Decisions that differ between two models on the same quadruples (method.md section 5).

    For a mean of two directions of retrieval, such as ``safe_retrieval@1``, `lost` and `gained` count items whose mean fell
    and rose.

    Attributes:
        lost: True under the reference, false under the candidate.
        gained: False under the reference, true under the candidate.
        p_value: Exact McNemar test, two-sided.
        delta: Candidate minus reference, percentage points, with its paired 95% interval.
        clusters: Groups of items without a shared picture or caption, which interval and test count; 0 where nobody looked.
    """

    n: int
    lost: int
    gained: int
    p_value: float
    delta: float
    delta_low: float
    delta_high: float
    lost_ids: tuple[str, ...] = ()
    gained_ids: tuple[str, ...] = ()
    clusters: int = field(default=0, metadata=LATER)

    def __post_init__(self) -> None:
        """Refuses counts and differences that cannot be; see `Proportion`."""
        counts = f"{self.lost} lost and {self.gained} gained of {self.n} items"
        _refuse_unless(min(self.lost, self.gained, self.clusters) >= 0, counts)
        _refuse_unless(self.n >= 1 and self.lost + self.gained <= self.n, counts)
        ends = (self.delta_low, self.delta, self.delta_high)
        _refuse_unless(all(abs(end) <= 10 * _ALL for end in ends), f"a difference of {self.delta:g} points")

    @property
    def independent(self) -> int:
        """Number that the interval comes from."""
        return self.clusters or self.n


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemOutcomes:
    """What every single item came to, so that two reports on the same items can be compared pair by pair.

    One bit per item in the order of the set, as hex digits; the first item is the highest bit of the first digit.

    Attributes:
        preference: Basic SafeGround metric to bits: the safe candidate won.
        concepts: Concept to bits: the item is of it.
        zero_shot: Set to bits: the image was recognised.
        retrieval: ``safe-text-to-image@1`` and so on to bits: a hit; ``hard-safe`` to bits: the item is one of those.
        alike: Row numbers of quadruples that hang together by a shared picture or caption, group by group.
        zero_shot_alike: The same of a zero-shot set's images; a set without any is missing.
    """

    preference: Mapping[str, str]
    concepts: Mapping[str, str]
    zero_shot: Mapping[str, str]
    retrieval: Mapping[str, str] = field(default_factory=dict)
    alike: tuple[tuple[int, ...], ...] = field(default=(), metadata=LATER)
    zero_shot_alike: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstItem:
    """One decision that an artifact, or the edit, made worse.

    Attributes:
        subject: Variant name, ``"onnx"`` or ``"edited"``.
        id: Of the quadruple.
        metric: The basic decision that got worst.
        margin: Similarity to the safe candidate minus to the unsafe one; negative is unsafe.
        reference_margin: The same under the model it is compared with.
        lost: Whether it was safe under the reference and no longer is.
    """

    subject: str
    id: str
    concept: str
    metric: str
    margin: float
    reference_margin: float
    lost: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankChange:
    """One safe query of a *hard safe* item whose right answer an edit moved down.

    Attributes:
        id: Of the quadruple.
        query: ``safe-text-to-image`` or ``safe-image-to-text``, whichever fell more.
        before: Place of the right answer under the original model, 1 for the first.
        after: The same under the edited model.
    """

    id: str
    concept: str
    query: str
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What became of the neighbourhoods and the spread of safe embeddings, against the original model on the same items.

    Attributes:
        neighbours: ``image-image``, ``text-text`` and ``text-image`` to the mean overlap (Jaccard) of the ten nearest safe
            neighbours, 0 to 1; empty with fewer than 11 items.
        spread: Tower to the total variance of its safe embeddings divided by the original's; 1 is unchanged.
    """

    neighbours: Mapping[str, Estimate]
    spread: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyReport:
    """SafeGround, retrieval and zero-shot of one model or artifact.

    Attributes:
        subject: ``"original"``, ``"edited"`` or a variant name.
        preference: The nine SafeGround metrics by name (P_ts, P_tu, P_vs, P_vu, Txt_s, Img_s, PS, PU, GS).
        per_concept: The same, per concept.
        retrieval: ``safe-text-to-image@1`` and so on; ``hard-safe-...`` among the items that look most unsafe to the
            original model; ``unsafe-first-text`` and ``unsafe-first-image``, where less is better.
        zero_shot: Top-1 per data set.
        zero_shot_missing: Sets that were asked for and did not run, with the reason; never counted as 0.
        items: Of a verify report; None where nothing is compared item by item.
        geometry: Against the original model; None for that one itself.
    """

    subject: str
    preference: Mapping[str, Proportion]
    per_concept: Mapping[str, Mapping[str, Proportion]]
    retrieval: Mapping[str, Proportion]
    zero_shot: Mapping[str, Proportion]
    zero_shot_missing: Mapping[str, str] = field(default_factory=dict)
    items: ItemOutcomes | None = None
    geometry: Geometry | None = None

    def __post_init__(self) -> None:
        """Refuses a report with some of the metrics, or another one: all nine come from the same rows."""
        for found in (self.preference, *self.per_concept.values()):
            if found and (wrong := set(found) ^ PREFERENCE):
                raise IntegrityError(
                    f"{self.subject}: the SafeGround metrics are not the nine: {', '.join(sorted(wrong))}",
                    fix="restore the file or build again",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number that is no proportion, in percent unless its field says otherwise, with its 95% interval.

    Attributes:
        n: Items it comes from.
    """

    value: float
    n: int
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryRisk:
    """What a safety head makes of the unsafe images of one concept.

    Attributes:
        auroc: Their risk level against that of all safe images.
        recall: Share of them that is at least redirected.
        named: Share of them whose most probable concept is theirs.
    """

    auroc: Estimate
    recall: Proportion
    named: Proportion


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskReport:
    """What a safety head makes of the evaluation set.

    Attributes:
        auroc: Risk level of unsafe against safe images.
        recall: Action to the share of unsafe images for which it, or a stricter one, is taken.
        benign: The same of the safe images: over-refusal.
        benign_zero_shot: The same of all images of the zero-shot sets, which are taken as safe; empty without any.
        named: Share of unsafe images whose most probable concept is theirs.
        ece: Expected calibration error of the risk level, percentage points, 15 bins.
        category_ece: The same of the most probable category.
        per_category: By concept.
    """

    auroc: Estimate
    recall: Mapping[str, Proportion]
    benign: Mapping[str, Proportion]
    benign_zero_shot: Mapping[str, Proportion]
    named: Proportion
    ece: float
    category_ece: float
    per_category: Mapping[str, CategoryRisk]
