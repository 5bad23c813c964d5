"""Stage `gate`: compares measured numbers with a policy. Only pass passes; what was not run never does."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from uwm_deploy.errors import RecipeError
from uwm_deploy.recipe import Limit, Policy
from uwm_deploy.records import (
    EXPORTED,
    ArtifactEvidence,
    Check,
    Digest,
    Evidence,
    Flips,
    Proportion,
    Result,
    SafetyReport,
    Verdict,
    VerifyReport,
)
from uwm_deploy.safeground.canaries import CANARIES, RATIO_LIMIT
from uwm_deploy.safeground.preference import BASIC


@dataclass(frozen=True, slots=True)
class _Measured:
    value: float
    n: int
    low: float | None = None
    high: float | None = None


def gate(report: VerifyReport, policy: Policy, *, policy_digest: Digest, report_digest: Digest) -> Verdict:
    """Judges a report.

    Args:
        report: What was measured.
        policy: The limits.
        policy_digest: Digest of the policy's text, recorded.
        report_digest: Digest of the report's file, recorded.

    Raises:
        RecipeError: If the policy limits a metric that does not exist.
    """
    general = [*_soundness(report), *(_check("edited", _edit_metrics(report), limit) for limit in policy.edit)]
    per_variant = {a.variant: _artifact_checks(a, policy) for a in report.artifacts}
    required = [_required(name, report.artifacts) for name in policy.required]
    executed = {a.variant for a in report.artifacts if a.evidence is Evidence.EXECUTED}
    good = [v for v in per_variant if v in executed and _all_pass(per_variant[v])]
    proven = tuple(v for v in good if v != EXPORTED)
    failed = tuple(v for v in per_variant if v in executed and v not in good)
    unproven = tuple(v for v in per_variant if v not in executed)
    judged = [check for variant in per_variant if variant in executed for check in per_variant[variant]]
    enough = _check_value(
        "proven variants",
        "build",
        _Measured(len(proven), len(per_variant)),
        Limit(metric="", at_least=policy.min_proven),
    )
    checks = (*general, *judged, *required, enough)
    return Verdict(
        result=_overall(checks),
        checks=checks,
        # A failure of the model itself proves nothing about what was compiled from it.
        proven=proven if _all_pass(general) and _all_pass(required) else (),
        unproven=unproven,
        failed=failed,
        policy=policy.name,
        policy_digest=policy_digest,
        report_digest=report_digest,
        edited_weights_digest=report.edited_weights_digest,
    )


def _all_pass(checks: Iterable[Check]) -> bool:
    return all(check.result is Result.PASS for check in checks)


def _overall(checks: Iterable[Check]) -> Result:
    results = {check.result for check in checks}
    for worst in (Result.FAIL, Result.NOT_RUN, Result.INCONCLUSIVE):
        if worst in results:
            return Result.FAIL if worst is Result.NOT_RUN else worst
    return Result.PASS


def _soundness(report: VerifyReport) -> list[Check]:
    """What no policy can switch off."""
    n = report.evaluation.n
    none = Limit(metric="", at_most=0, reason="scores must not come from what they are measured on")
    changed = report.edited_weights_digest != report.model.weights_digest
    return [
        _check_value("calibration items in the evaluation set", "data", _Measured(report.calibration_overlap, n), none),
        _statement(
            "weights come from a checkpoint", "model", report.model.repo != "random", "random weights are never safe"
        ),
        _statement("the edit changes the weights", "edited", changed, "the edited weights are the original ones"),
    ]


def _statement(name: str, subject: str, true: bool, otherwise: str) -> Check:
    return Check(
        name=name,
        subject=subject,
        result=Result.PASS if true else Result.FAIL,
        measured=float(true),
        limit=1.0,
        direction="equals",
        detail="" if true else otherwise,
    )


def _artifact_checks(artifact: ArtifactEvidence, policy: Policy) -> list[Check]:
    if artifact.evidence is not Evidence.EXECUTED or artifact.safety is None:
        return []
    finite = all(part.finite for part in artifact.parity) and bool(artifact.parity)
    metrics = _artifact_metrics(artifact, artifact.safety)
    return [
        _statement("outputs are finite", artifact.variant, finite, "NaN or infinity in an output"),
        *(_canary(artifact.variant, tower, worst) for tower, worst in artifact.canaries.items()),
        *(
            _check(artifact.variant, metrics, limit)
            for limit in policy.artifact
            if not limit.precision or artifact.precision in limit.precision
        ),
    ]


def _canary(variant: str, tower: str, worst: float) -> Check:
    """Nearer to the edited model than to the original one, where they differ most; no policy can switch it off."""
    limit = Limit(
        metric="", at_most=RATIO_LIMIT, reason="on an input where they differ, it is nearer to the original model"
    )
    return _check_value(f"canaries of the {tower} tower", variant, _Measured(worst, CANARIES), limit)


def _required(name: str, artifacts: Iterable[ArtifactEvidence]) -> Check:
    found = {a.variant: a for a in artifacts}
    executed = name in found and found[name].evidence is Evidence.EXECUTED
    reason = found[name].reason if name in found else "it was not built"
    return Check(
        name="required evidence",
        subject=name,
        result=Result.PASS if executed else Result.NOT_RUN,
        measured=None,
        limit=None,
        direction="equals",
        detail="" if executed else f"not run: {reason}",
    )


Metrics = dict[str, Callable[[], _Measured]]


def _edit_metrics(report: VerifyReport) -> Metrics:
    """Metrics of the edited model; `.delta` is edited minus original, percentage points."""
    metrics = _safety_metrics(report.edited)
    metrics |= {f"{name}.delta": _delta(f) for name, f in report.edit_effect.items()}
    metrics["zero_shot_mean.delta"] = _mean_delta(report.edit_effect)
    return metrics


def _artifact_metrics(artifact: ArtifactEvidence, safety: SafetyReport) -> Metrics:
    """Metrics of an artifact; `.delta` and `flips` are against the edited model."""
    metrics = _safety_metrics(safety)
    metrics |= {f"{name}.delta": _delta(f) for name, f in artifact.flips.items()}
    metrics["zero_shot_mean.delta"] = _mean_delta(artifact.flips)
    rows = sum(part.n for part in artifact.parity)
    metrics["parity.cosine_min"] = lambda: _Measured(min(p.cosine_min for p in artifact.parity), rows)
    metrics["parity.max_abs"] = lambda: _Measured(max(p.max_abs for p in artifact.parity), rows)
    metrics["parity.mean_abs"] = lambda: _Measured(max(p.mean_abs for p in artifact.parity), rows)
    for name, f in artifact.flips.items():
        metrics[f"flips.{name}"] = _flip_share(f)
        metrics[f"lost.{name}"] = _lost_share(f)
    basic = [artifact.flips[name] for name in BASIC if name in artifact.flips]
    metrics["flips.any"] = lambda: max((_flip_share(f)() for f in basic), key=lambda m: m.value)
    return metrics


def _safety_metrics(safety: SafetyReport) -> Metrics:
    parts: dict[str, Proportion] = {
        **safety.preference,
        **safety.retrieval,
        **{f"zero_shot.{name}": p for name, p in safety.zero_shot.items()},
    }
    return {name: _proportion(p) for name, p in parts.items()}


def _proportion(p: Proportion) -> Callable[[], _Measured]:
    return lambda: _Measured(p.value, p.n, p.low, p.high)


def _delta(f: Flips) -> Callable[[], _Measured]:
    return lambda: _Measured(f.delta, f.n, f.delta_low, f.delta_high)


def _flip_share(f: Flips) -> Callable[[], _Measured]:
    return lambda: _Measured(100 * (f.lost + f.gained) / f.n, f.n)


def _lost_share(f: Flips) -> Callable[[], _Measured]:
    return lambda: _Measured(100 * f.lost / f.n, f.n)


def _mean_delta(effects: object) -> Callable[[], _Measured]:
    sets = [f for name, f in dict(effects).items() if name.startswith("zero_shot.")]  # type: ignore[call-overload]

    def mean() -> _Measured:
        if not sets:
            return _Measured(float("nan"), 0)
        return _Measured(sum(f.delta for f in sets) / len(sets), sum(f.n for f in sets))

    return mean


def _check(subject: str, metrics: Metrics, limit: Limit) -> Check:
    if limit.metric not in metrics:
        near = difflib.get_close_matches(limit.metric, metrics, n=3, cutoff=0.3)
        raise RecipeError(f"policy limits an unknown metric {limit.metric!r}", fix=f"nearest: {', '.join(near)}")
    return _check_value(limit.metric, subject, metrics[limit.metric](), limit)


def _check_value(name: str, subject: str, measured: _Measured, limit: Limit) -> Check:
    least = limit.at_least is not None
    bound = limit.at_least if limit.at_least is not None else limit.at_most
    assert bound is not None
    if measured.n < limit.min_n:
        result, detail = Result.INCONCLUSIVE, f"n = {measured.n}, the limit needs {limit.min_n}"
    elif measured.value != measured.value:
        result, detail = Result.NOT_RUN, "not measured"
    else:
        good = measured.value >= bound if least else measured.value <= bound
        result = Result.PASS if good else Result.FAIL
        words = "at least" if least else "at most"
        detail = (
            ""
            if good
            else f"measured {measured.value:.6g}, must be {words} {bound:g} (n = {measured.n}) {limit.reason}"
        )
    return Check(
        name=name,
        subject=subject,
        result=result,
        measured=None if measured.value != measured.value else float(measured.value),
        limit=float(bound),
        direction="at_least" if least else "at_most",
        detail=detail.strip(),
        n=measured.n,
        low=measured.low,
        high=measured.high,
    )
