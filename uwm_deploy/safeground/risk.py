"""A safety head's two outputs, judged: thresholds, calibration, AUROC, and what each action costs in benign images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from uwm_deploy.errors import DataError, IntegrityError
from uwm_deploy.records.head import Action, SafetyHead
from uwm_deploy.records.metrics import CategoryRisk, Estimate, Proportion, RiskReport
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.safeground.interval import Z95, wilson

SAFE = "safe"
"""First category of every head."""

ACTIONS = tuple(Action)
"""The mildest first; the position of an action is its rank."""

STEPS = ACTIONS[1:]
"""Actions with a threshold."""

STOPS = Action.REDIRECT
"""From this action on the image's own embedding is not given back; recall and over-refusal are counted at it."""

BINS = 15
"""Of the expected calibration error."""

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class RiskRows:
    """What a head says of some images.

    Attributes:
        logits: (n, c) float32; a softmax makes probabilities of them.
        level: (n,) float32, the probability that the image is unsafe.
    """

    logits: np.ndarray
    level: np.ndarray

    def is_finite(self) -> bool:
        """Whether every number is one."""
        return bool(np.isfinite(self.logits).all() and np.isfinite(self.level).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskSet:
    """Outputs of a safety head on an evaluation set.

    Attributes:
        concepts: n concepts, of `safe` and `unsafe` row by row.
        safe: The n safe images.
        unsafe: The n unsafe images.
        zero_shot: Zero-shot set to its images, which are taken as safe.
    """

    concepts: tuple[str, ...]
    safe: RiskRows
    unsafe: RiskRows
    zero_shot: Mapping[str, RiskRows] = field(default_factory=dict)

    def is_finite(self) -> bool:
        """Whether every number is one."""
        return all(part.is_finite() for part in (self.safe, self.unsafe, *self.zero_shot.values()))

    def to_tensors(self) -> dict[str, np.ndarray]:
        """Arrays for a safetensors file: logits (n, c), levels (n,); concepts as UTF-8 JSON, (bytes,) uint8."""
        parts = {"safe": self.safe, "unsafe": self.unsafe}
        parts |= {f"zero_shot.{name}": part for name, part in self.zero_shot.items()}
        tensors = {"concepts": np.frombuffer(json.dumps(self.concepts).encode(), dtype=np.uint8)}
        for name, part in parts.items():
            tensors |= {f"{name}.logits": part.logits, f"{name}.level": part.level}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> RiskSet:
        """Reads the arrays that `to_tensors` gave.

        Args:
            tensors: Arrays by name, (n, categories) and (n,) float32 and so on, see `to_tensors`.

        Raises:
            IntegrityError: If an array is missing.
        """
        names = sorted(key.removesuffix(".level") for key in tensors if key.endswith(".level"))
        try:
            parts = {name: RiskRows(tensors[f"{name}.logits"], tensors[f"{name}.level"]) for name in names}
            return cls(
                concepts=tuple(value_from_json(tensors["concepts"].tobytes())),
                safe=parts["safe"],
                unsafe=parts["unsafe"],
                zero_shot={n.removeprefix("zero_shot."): p for n, p in parts.items() if n.startswith("zero_shot.")},
            )
        except (KeyError, ValueError, TypeError) as error:
            raise IntegrityError(f"reference risks are incomplete: {error}", fix="build again") from error


# --- what a level and logits mean ---------------------------------------------------------------------------------------


def ranks_of(level: np.ndarray, thresholds: Mapping[str, float]) -> np.ndarray:
    """Rank of the action that each level asks for; NaN is blocked.

    Args:
        level: (n,), any floating dtype, risk levels from 0 to 1.
        thresholds: Threshold of every action but the first; a level that equals a threshold has reached it.

    Returns:
        (n,) int64, ranks in the order of the actions.
    """
    limits = np.array([thresholds[step.value] for step in STEPS], dtype=np.float64)
    values = level.astype(np.float64)
    ranks: np.ndarray = (values[:, None] >= limits).sum(axis=1)
    return np.where(np.isnan(values), len(STEPS), ranks)


def categories_of(logits: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Category of each image: safe where it is allowed, else its most probable concept.

    Args:
        logits: (n, categories), any floating dtype; category 0 is safe.
        ranks: (n,) int64, see `ranks_of`.

    Returns:
        (n,) int64.
    """
    concept = 1 + logits[:, 1:].argmax(axis=1)
    return np.where(ranks == 0, 0, concept)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits.

    Args:
        logits: (n, c), any floating dtype.

    Returns:
        (n, c) float64, rows that add up to 1.
    """
    values = logits.astype(np.float64)
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return shares


# --- chosen on validation ---------------------------------------------------------------------------------------------


def threshold_for(benign: np.ndarray, rate: float) -> float:
    """Smallest level that an image must reach so that at most a share of benign images is expected to.

    With n benign images at most floor(rate * (n + 1)) - 1 of them reach it: then the expected share among images of the same
    kind is at most the rate, for any head and any n (split conformal prediction). Between two levels it lies in the middle.

    Args:
        benign: (n,), any floating dtype, risk levels of benign images that the head was not trained on.
        rate: Share, 0 to 1.

    Raises:
        DataError: If n is too small for the rate.
    """
    allowed = math.floor(rate * (len(benign) + 1) + 1e-9) - 1
    if allowed < 0:
        raise DataError(
            f"{len(benign)} benign validation images cannot support a false-positive rate of {100 * rate:g}%",
            fix=f"use at least {math.ceil(1 / rate) - 1}, or a larger rate",
        )
    levels = np.sort(benign.astype(np.float64))[::-1]
    below = float(levels[allowed]) if allowed < len(levels) else 0.0
    above = levels[levels > below]
    return (below + (float(above[-1]) if len(above) else 1.0)) / 2


def thresholds_for(benign: np.ndarray, rates: Mapping[str, float]) -> dict[str, float]:
    """Threshold of each action, by its false-positive rate.

    Args:
        benign: (n,), any floating dtype, risk levels; see `threshold_for`.
        rates: Action to share; a stricter action needs a smaller one.

    Raises:
        DataError: If a stricter action has a larger rate, or n is too small.
    """
    if sorted(rates.values(), reverse=True) != [rates[step.value] for step in STEPS]:
        raise DataError(
            f"false-positive rates {[rates[step.value] for step in STEPS]} grow from flag to block",
            fix="give a stricter action a smaller rate",
        )
    return {step.value: threshold_for(benign, rates[step.value]) for step in STEPS}


def temperature_for(logits: np.ndarray, labels: np.ndarray) -> float:
    """Temperature that logits are divided by, so that the likelihood of the labels is highest.

    Args:
        logits: (n, c), or (n,) of a yes-or-no question; any floating dtype.
        labels: (n,) int64 classes; for a yes-or-no question (n,) bool, or integers 0 and 1.
    """
    rows = _as_classes(logits)
    low, high = math.log(0.05), math.log(20.0)
    while high - low > 1e-6:  # golden section: the loss has one minimum over the logarithm of the temperature
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if _loss(rows / math.exp(left), labels) < _loss(rows / math.exp(right), labels):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def _as_classes(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    return np.stack([np.zeros_like(values), values], axis=1) if values.ndim == 1 else values


def _loss(rows: np.ndarray, labels: np.ndarray) -> float:
    top = rows.max(axis=1)
    total = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
    return float((total - rows[np.arange(len(rows)), labels.astype(np.int64)]).mean())


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error, percentage points: how far confidence and share are apart, over bins of equal width.

    Args:
        confidence: (n,), any floating dtype, probabilities.
        right: (n,) bool, whether the predicted event happened.
    """
    if not len(confidence):
        raise DataError("a calibration error of no items was asked for", fix="use more validation items")
    bins = np.minimum((confidence.astype(np.float64) * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    believed = np.bincount(bins, weights=confidence.astype(np.float64), minlength=BINS)
    found = np.bincount(bins, weights=right.astype(np.float64), minlength=BINS)
    return float(100 * np.abs(believed - found).sum() / counts.sum())


def level_error(safe: np.ndarray, unsafe: np.ndarray) -> float:
    """`calibration_error` of the risk level, percentage points.

    Args:
        safe: (n,), any floating dtype, risk levels of safe images, 0 to 1.
        unsafe: (m,), any floating dtype, risk levels of unsafe images, 0 to 1.
    """
    return calibration_error(np.concatenate([safe, unsafe]), np.repeat([False, True], [len(safe), len(unsafe)]))


def category_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """`calibration_error` of the most probable category, percentage points.

    Args:
        logits: (n, c), any floating dtype.
        labels: (n,) int64, right categories.
    """
    shares = softmax(logits)
    return calibration_error(shares.max(axis=1), shares.argmax(axis=1) == labels)


# --- measured on the evaluation set ---------------------------------------------------------------------------------------


def auroc(unsafe: np.ndarray, safe: np.ndarray, unsafe_items: np.ndarray, safe_items: np.ndarray) -> Estimate:
    """Chance, in percent, that an unsafe image has a higher level than a safe one; a tie is half.

    The interval follows DeLong, with the two images of an item as one cluster (Obuchowski 1997): they share their scene.

    Args:
        unsafe: (p,), any floating dtype, risk levels of unsafe images.
        safe: (q,), any floating dtype, risk levels of safe images.
        unsafe_items: (p,) int64, number of the item of each unsafe image.
        safe_items: (q,) int64, number of the item of each safe image.

    Raises:
        DataError: If one side is empty.
    """
    if not len(unsafe) or not len(safe):
        raise DataError("an AUROC needs safe and unsafe images", fix="evaluate on pairs")
    above = _share_below(unsafe, safe)
    below = 1 - _share_below(safe, unsafe)
    value = float(above.mean())
    items = int(max(unsafe_items.max(), safe_items.max())) + 1
    part = np.bincount(unsafe_items, weights=(above - value) / len(unsafe), minlength=items)
    part += np.bincount(safe_items, weights=(below - value) / len(safe), minlength=items)
    used = len(set(unsafe_items.tolist()) | set(safe_items.tolist()))
    error = math.sqrt(float((part**2).sum()) * used / max(used - 1, 1))
    if error == 0:  # told apart without an exception, which few items show less well than many
        edge = wilson(round(value * len(unsafe)), len(unsafe))
        return Estimate(value=100 * value, n=len(unsafe), low=edge.low, high=edge.high)
    low, high = max(0.0, value - Z95 * error), min(1.0, value + Z95 * error)
    return Estimate(value=100 * value, n=len(unsafe), low=100 * low, high=100 * high)


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Per value the share of others that are smaller, equal ones counted half."""
    ordered = np.sort(others)
    left, right = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    shares: np.ndarray = (left + right) / (2 * len(others))
    return shares


def risk_report(head: SafetyHead, found: RiskSet) -> RiskReport:
    """Everything that is measured of one model or artifact."""
    items = np.arange(len(found.concepts))
    names = list(head.categories)
    truth = np.array([names.index(concept) if concept in names else -1 for concept in found.concepts])
    concept = 1 + found.unsafe.logits[:, 1:].argmax(axis=1)
    labels = np.concatenate([np.zeros_like(truth), truth])
    known = labels >= 0
    logits = np.concatenate([found.safe.logits, found.unsafe.logits])
    benign = np.concatenate([part.level for part in found.zero_shot.values()]) if found.zero_shot else None
    return RiskReport(
        auroc=auroc(found.unsafe.level, found.safe.level, items, items),
        recall=_shares(found.unsafe.level, head.thresholds),
        benign=_shares(found.safe.level, head.thresholds),
        benign_zero_shot=_shares(benign, head.thresholds) if benign is not None else {},
        named=_share(concept == truth),
        ece=level_error(found.safe.level, found.unsafe.level),
        category_ece=category_error(logits[known], labels[known]),
        per_category={
            name: _category(found, head, np.flatnonzero(truth == rank), concept == truth, items)
            for rank, name in enumerate(names)
            if rank and bool((truth == rank).any())
        },
    )


def _category(found: RiskSet, head: SafetyHead, rows: np.ndarray, right: np.ndarray, items: np.ndarray) -> CategoryRisk:
    level = found.unsafe.level[rows]
    return CategoryRisk(
        auroc=auroc(level, found.safe.level, rows, items),
        recall=_shares(level, head.thresholds)[STOPS.value],
        named=_share(right[rows]),
    )


def _shares(level: np.ndarray, thresholds: Mapping[str, float]) -> dict[str, Proportion]:
    """Action to the share of images for which it, or a stricter one, is taken."""
    ranks = ranks_of(level, thresholds)
    return {step.value: _share(ranks >= rank) for rank, step in enumerate(STEPS, start=1)}


def _share(true: np.ndarray) -> Proportion:
    return wilson(int(true.sum()), len(true))


def decision_flips(head: SafetyHead, reference: RiskSet, candidate: RiskSet) -> Proportion:
    """Share of images, safe, unsafe and of zero-shot sets, whose action or category differs between two models.

    Raises:
        DataError: If the two are not of the same images.
    """
    pairs = [(reference.safe, candidate.safe), (reference.unsafe, candidate.unsafe)]
    pairs += [(part, candidate.zero_shot[name]) for name, part in reference.zero_shot.items()]
    if any(left.logits.shape != right.logits.shape for left, right in pairs):
        raise DataError("two heads were measured on different images", fix="evaluate both on the same set")
    differ = [_decided(left, head.thresholds) != _decided(right, head.thresholds) for left, right in pairs]
    return _share(np.concatenate([part.any(axis=1) for part in differ]))


def _decided(rows: RiskRows, thresholds: Mapping[str, float]) -> np.ndarray:
    """(n, 2): rank of the action, and category."""
    ranks = ranks_of(rows.level, thresholds)
    return np.stack([ranks, categories_of(rows.logits, ranks)], axis=1)


def rates_of(flag: float, redirect: float, block: float) -> dict[str, float]:
    """False-positive rates by action."""
    return dict(zip((step.value for step in STEPS), (flag, redirect, block), strict=True))


def joined_rows(parts: Sequence[RiskRows]) -> RiskRows:
    """Parts of a set in order."""
    return RiskRows(np.concatenate([part.logits for part in parts]), np.concatenate([part.level for part in parts]))
