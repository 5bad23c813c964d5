"""The metrics that a policy can limit, read from reports: name to a number with its n, interval and spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from uwm_deploy.records.evidence import ArtifactEvidence, ScaledDecoding, VerifyReport
from uwm_deploy.records.metrics import Estimate, Flips, Proportion, RiskReport, SafetyReport
from uwm_deploy.safeground.geometry import NEIGHBOURS, SPREADS
from uwm_deploy.safeground.interval import Z95, wilson
from uwm_deploy.safeground.outcomes import flips_by_concept, flips_since
from uwm_deploy.safeground.preference import BASIC
from uwm_deploy.safeground.retrieval import HARD, MEANS, PAIRED, UNIONS
from uwm_deploy.safeground.risk import STOPS


@dataclass(frozen=True, slots=True)
class Measured:
    """One number.

    Attributes:
        value: NaN when it was not measured.
        n: Items it comes from, those that share a picture or a caption counted once.
        low: Lower end of the 95% interval; None where there is none.
        high: Upper end.
        spread: Standard deviation of one item's contribution, in points; the standard error is spread / sqrt(n).
        difference: Whether it is a difference of two models, so that 0 means no change.
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    difference: bool = False


Metrics = Mapping[str, Callable[[], Measured]]


def edit_metrics(report: VerifyReport) -> Metrics:
    """Of the edited model; `.delta` is edited minus original, percentage points."""
    return _safety_metrics(report.edited) | _delta_metrics(report.edit_effect)


def artifact_metrics(artifact: ArtifactEvidence, safety: SafetyReport) -> Metrics:
    """Of an artifact; `.delta`, `flips` and `lost` are against the edited model."""
    rows = sum(part.n for part in artifact.parity)
    items = [part for concepts in artifact.rows.values() for part in concepts.values()]
    whole = rows + sum(part.n for part in items)
    compared = [(part.cosine_min, part.max_abs) for part in items]
    compared += [(part.cosine_min, part.max_abs) for part in artifact.parity]
    parity: dict[str, Callable[[], Measured]] = {
        "parity.cosine_min": lambda: Measured(min(cosine for cosine, _ in compared), whole),
        "parity.max_abs": lambda: Measured(max(largest for _, largest in compared), whole),
        "parity.mean_abs": lambda: Measured(max(p.mean_abs for p in artifact.parity), rows),
    }
    return _safety_metrics(safety) | _delta_metrics(artifact.flips) | _flip_metrics(artifact.flips) | parity


def decoding_metrics(found: ScaledDecoding) -> Metrics:
    """Decoding at a reduced size against decoding in full."""
    return _flip_metrics(found.flips) | {
        "parity.cosine_min": lambda: Measured(found.cosine_min, found.reduced),
    }


def concept_metrics(reference: SafetyReport, candidate: SafetyReport) -> dict[str, Metrics]:
    """Concept to its metrics; differences are candidate minus reference, within the concept."""
    changes = flips_by_concept(reference, candidate)
    return {
        concept: {name: share_of(p) for name, p in candidate.per_concept[concept].items()}
        | {f"{name}.delta": change_of(f) for name, f in flips.items()}
        | _flip_metrics(flips)
        for concept, flips in changes.items()
    }


def risk_metrics(risk: RiskReport, artifact: ArtifactEvidence | None = None) -> Metrics:
    """Of a safety head: on the edited model, or on an artifact, where decisions are compared with the edited model's."""
    found: dict[str, Callable[[], Measured]] = {
        "risk.auroc": _estimate(risk.auroc),
        "risk.recall": share_of(risk.recall[STOPS.value]),
        "risk.benign_stopped": share_of(risk.benign[STOPS.value]),
        "risk.named": share_of(risk.named),
        "risk.ece": lambda: Measured(risk.ece, risk.auroc.n * 2),
    }
    if risk.benign_zero_shot:
        found["risk.benign_zero_shot_stopped"] = share_of(risk.benign_zero_shot[STOPS.value])
    if artifact is not None:
        rows = sum(part.n for part in artifact.risk_parity)
        flips = artifact.risk_flips
        found["risk.flips"] = share_of(flips) if flips else lambda: Measured(float("nan"), 0)
        found["risk.parity.max_abs"] = lambda: Measured(
            max((part.max_abs for part in artifact.risk_parity), default=float("nan")), rows
        )
    return found


def category_metrics(risk: RiskReport) -> dict[str, Metrics]:
    """Concept to what the safety head makes of its unsafe images."""
    return {
        concept: {
            "risk.category.auroc": _estimate(part.auroc),
            "risk.category.recall": share_of(part.recall),
            "risk.category.named": share_of(part.named),
        }
        for concept, part in risk.per_category.items()
    }


def _estimate(found: Estimate) -> Callable[[], Measured]:
    spread = (found.high - found.low) / 2 / Z95 * math.sqrt(found.n)
    return lambda: Measured(found.value, found.n, found.low, found.high, spread)


def baseline_metrics(accepted: SafetyReport, now: SafetyReport) -> Metrics:
    """Differences since the accepted report, on the same items."""
    flips = flips_since(accepted, now)
    return _delta_metrics(flips) | _flip_metrics(flips)


def _safety_metrics(safety: SafetyReport) -> dict[str, Callable[[], Measured]]:
    parts: dict[str, Proportion] = {
        **safety.preference,
        **safety.retrieval,
        **{f"zero_shot.{name}": p for name, p in safety.zero_shot.items()},
    }
    # What a small set, or a report of an earlier release, has no number for is not measured; it is no typing error.
    return _absent(*UNIONS, *HARD) | {name: share_of(p) for name, p in parts.items()} | _geometry_metrics(safety)


def _geometry_metrics(safety: SafetyReport) -> dict[str, Callable[[], Measured]]:
    found = _absent(*(f"neighbours.{name}" for name in NEIGHBOURS), *(f"spread.{tower}" for tower in SPREADS))
    if safety.geometry is not None:
        n = safety.preference["GS"].independent
        found |= {
            f"neighbours.{name}": _plain(e.value, e.n, e.low, e.high) for name, e in safety.geometry.neighbours.items()
        }
        found |= {f"spread.{tower}": _plain(value, n) for tower, value in safety.geometry.spread.items()}
    return found


def _plain(value: float, n: int, low: float | None = None, high: float | None = None) -> Callable[[], Measured]:
    return lambda: Measured(value, n, low, high)  # without a spread, which is in points and these are not


def _absent(*names: str) -> dict[str, Callable[[], Measured]]:
    return dict.fromkeys(names, lambda: Measured(math.nan, 0))


def _delta_metrics(effects: Mapping[str, Flips]) -> dict[str, Callable[[], Measured]]:
    found = _absent(*(f"{name}.delta" for name in PAIRED))
    found |= {f"{name}.delta": _mean_of_directions(f) if name in MEANS else change_of(f) for name, f in effects.items()}
    found["zero_shot_mean.delta"] = lambda: _mean_delta(effects)
    return found


def _flip_metrics(effects: Mapping[str, Flips]) -> dict[str, Callable[[], Measured]]:
    """Of decisions and of what is recognised; a hit of retrieval is neither, and lost has no one meaning there."""
    effects = {name: f for name, f in effects.items() if name not in PAIRED}
    found = {f"flips.{name}": _share(f, f.lost + f.gained) for name, f in effects.items()}
    found |= {f"lost.{name}": _share(f, f.lost) for name, f in effects.items()}
    basic = [found[f"flips.{name}"] for name in BASIC if name in effects]
    found["flips.any"] = lambda: max((part() for part in basic), key=lambda m: m.value)
    return found


def share_of(p: Proportion) -> Callable[[], Measured]:
    """A share with its interval."""
    # One item more on either side, so that 0 and 100% do not look as if they had no spread.
    n = p.independent
    share = (p.value * n / 100 + 1) / (n + 2)
    spread = 100 * math.sqrt(share * (1 - share))
    return lambda: Measured(p.value, n, p.low, p.high, spread)


def _share(f: Flips, count: int) -> Callable[[], Measured]:
    return share_of(wilson(count, f.n, clusters=f.independent))


def change_of(f: Flips) -> Callable[[], Measured]:
    """A paired difference with its interval."""
    n = f.independent
    spread = 100 * math.sqrt(((f.lost + f.gained) * n / f.n + 1) / (n + 2))
    return lambda: Measured(f.delta, n, f.delta_low, f.delta_high, spread, difference=True)


def _mean_of_directions(f: Flips) -> Callable[[], Measured]:
    """An item counts half where one direction of two changed, so its counts say less of the spread than its interval."""
    spread = (f.delta_high - f.delta_low) / 2 / Z95 * math.sqrt(f.independent)
    return lambda: Measured(f.delta, f.independent, f.delta_low, f.delta_high, spread, difference=True)


def _mean_delta(effects: Mapping[str, Flips]) -> Measured:
    """Mean of the differences over the zero-shot sets; the sets are independent, so their variances add up."""
    sets = [f for name, f in effects.items() if name.startswith("zero_shot.")]
    if not sets:
        return Measured(float("nan"), 0, difference=True)
    value = sum(f.delta for f in sets) / len(sets)
    error = math.sqrt(sum(((f.delta_high - f.delta_low) / 2 / Z95) ** 2 for f in sets)) / len(sets)
    n = sum(f.independent for f in sets)
    half = Z95 * error
    return Measured(value, n, value - half, value + half, error * math.sqrt(n), difference=True)
