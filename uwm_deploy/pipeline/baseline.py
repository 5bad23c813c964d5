"""Accepted reports: `baseline.json` in a folder of the repository or inside a bundle, pinned by its digest."""

from __future__ import annotations

import dataclasses
from datetime import UTC, date, datetime
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle, is_bundle, open_bundle
from uwm_deploy.bundle.write import Sign, bundle_from_parts
from uwm_deploy.errors import InputError, IntegrityError, unreadable
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_bytes, write_atomic
from uwm_deploy.records.metrics import Flips, SafetyReport
from uwm_deploy.records.model import Digest
from uwm_deploy.records.replacing import Workplace
from uwm_deploy.records.verdict import Baseline, Verdict
from uwm_deploy.safeground.outcomes import flips_since
from uwm_deploy.safeground.retrieval import MEANS
from uwm_deploy.stages.gate.gate import comparable

BASELINE = BundleLayout.BASELINE


def accepted(report: VerifyReport, verdict: Verdict, *, by: str, reason: str, today: date | None = None) -> Baseline:
    """A report as a baseline.

    Raises:
        InputError: If nobody answers for it.
    """
    if not by.strip() or not reason.strip():
        raise InputError("a baseline needs someone who accepts it and a reason", fix="give --by and --reason")
    return Baseline(
        report=report,
        report_digest=_digest(report),
        policy=verdict.policy,
        policy_digest=verdict.policy_digest,
        accepted_by=by.strip(),
        reason=reason.strip(),
        accepted=(today or datetime.now(UTC).date()).isoformat(),
    )


def write_baseline(path: Path, baseline: Baseline) -> Digest:
    """Stores a baseline in a folder that is no bundle.

    Returns:
        Digest of the file, which a policy can pin.
    """
    content = json_from_record(baseline).encode()
    write_atomic(path / BASELINE, content)
    return digest_of_bytes(content)


def write_baseline_into(place: Workplace, bundle: Bundle, baseline: Baseline, *, sign: Sign | None) -> Digest:
    """Stores a baseline in a bundle; every other byte stays, as it was checked when the bundle was opened.

    Args:
        place: The right to replace the bundle.
        bundle: The bundle as it is.
        baseline: What was accepted.
        sign: Makes the new signature.

    Returns:
        Digest of the file, which a policy can pin.

    Raises:
        IntegrityError: If a file was changed since the bundle was opened.
    """
    content = json_from_record(baseline).encode()
    bundle_from_parts(place, bundle.manifest, {**bundle.kept(), BASELINE: content}, sign=sign)
    return digest_of_bytes(content)


def read_baseline(path: Path) -> tuple[Baseline, Digest]:
    """Baseline of a folder, a bundle or a file, and the digest of its file.

    Raises:
        InputError: If there is none.
        IntegrityError: If it was changed.
    """
    if is_bundle(path):
        if (found := baseline_in(open_bundle(path, allow_failed=True))) is None:
            raise InputError(f"the bundle {path} holds no baseline", fix="store one with `uwm-deploy baseline set`")
        return found
    file = path / BASELINE if path.is_dir() else path
    try:
        content = file.read_bytes()
    except OSError as error:
        fix = "store a baseline with `uwm-deploy baseline set`"
        raise unreadable(str(file), error, fix=fix, kind=InputError) from error
    return _checked(content, str(path))


def baseline_in(bundle: Bundle) -> tuple[Baseline, Digest] | None:
    """Baseline of an opened bundle, and the digest of its file; None if it has none.

    Raises:
        IntegrityError: If it was changed.
    """
    if not any(file.path == BASELINE for file in bundle.manifest.files):
        return None
    return _checked(bundle.read(BASELINE), str(bundle.path))


def _checked(content: bytes, where: str) -> tuple[Baseline, Digest]:
    baseline = record_from_json(Baseline, content, where=BASELINE)
    if _digest(baseline.report) != baseline.report_digest or json_from_record(baseline).encode() != content:
        raise IntegrityError(f"{where}: the baseline is not the report that was accepted", fix="restore it")
    return baseline, digest_of_bytes(content)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One metric of one subject, then and now.

    Attributes:
        before: Percentage in the baseline.
        after: Percentage in the report.
        flips: Item by item.
    """

    subject: str
    metric: str
    before: float
    after: float
    flips: Flips


def changes(report: VerifyReport, baseline: Baseline) -> list[Change]:
    """Every metric of the edited model and of the artifacts that both reports have.

    Raises:
        InputError: If the two were not measured alike.
    """
    comparable(report, baseline)
    found = []
    then, now = _subjects(baseline.report), _subjects(report)
    for subject in (name for name in now if name in then):
        before, after = then[subject], now[subject]
        for metric, flips in flips_since(before, after).items():
            values = [_value_of(part, metric) for part in (before, after)]
            found.append(Change(subject=subject, metric=metric, before=values[0], after=values[1], flips=flips))
    return found


def _value_of(safety: SafetyReport, metric: str) -> float:
    """Percentage that the flips of a metric are about."""
    if metric.startswith("zero_shot."):
        return safety.zero_shot[metric.removeprefix("zero_shot.")].value
    if metric in MEANS:
        return sum(safety.retrieval[name].value for name in MEANS[metric]) / len(MEANS[metric])
    return (safety.preference.get(metric) or safety.retrieval[metric]).value


def _subjects(report: VerifyReport) -> dict[str, SafetyReport]:
    return {"edited": report.edited} | {a.variant: a.safety for a in report.artifacts if a.safety is not None}


def _digest(report: VerifyReport) -> Digest:
    return digest_of_bytes(json_from_record(report).encode())
