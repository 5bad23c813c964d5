"""Accepted reports: `baseline.json` in a folder of the repository or inside a bundle, pinned by its digest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import MANIFEST, open_bundle
from uwm_deploy.bundle.signature import PublicKey
from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_bytes, write_atomic
from uwm_deploy.records.metrics import Flips, SafetyReport
from uwm_deploy.records.model import Digest
from uwm_deploy.records.verdict import Baseline, Verdict
from uwm_deploy.safeground.outcomes import flips_since
from uwm_deploy.safeground.retrieval import MEANS
from uwm_deploy.stages.gate.gate import comparable

BASELINE = BundleLayout.BASELINE

Write = Callable[[Path, Manifest, Mapping[str, Path | bytes]], object]
"""What writes a bundle, whole or not at all."""


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


def write_baseline(path: Path, baseline: Baseline, write: Write, *, public_key: PublicKey | None = None) -> Digest:
    """Stores a baseline in a folder, or in the bundle that the folder is.

    Args:
        path: Folder.
        baseline: What was accepted.
        write: What writes a bundle.
        public_key: Whose signature the bundle must have before.

    Returns:
        Digest of the file, which a policy can pin.
    """
    content = json_from_record(baseline).encode()
    if is_bundle(path):
        bundle = open_bundle(path, allow_failed=True, public_key=public_key)
        parts: dict[str, Path | bytes] = {file.path: path / file.path for file in bundle.manifest.files}
        write(path, bundle.manifest, parts | {BASELINE: content})
    else:
        write_atomic(path / BASELINE, content)
    return digest_of_bytes(content)


def read_baseline(path: Path) -> tuple[Baseline, Digest]:
    """Baseline of a folder, a bundle or a file, and the digest of its file.

    Raises:
        InputError: If there is none.
        IntegrityError: If it was changed.
    """
    if is_bundle(path):
        if not has_baseline(path):
            raise InputError(f"the bundle {path} holds no baseline", fix="store one with `uwm-deploy baseline set`")
        content = open_bundle(path, allow_failed=True).read(BASELINE)
    else:
        file = path / BASELINE if path.is_dir() else path
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(
                f"{file} cannot be read: {error.strerror}", fix="store a baseline with `uwm-deploy baseline set`"
            ) from error
    baseline = record_from_json(Baseline, content, where=BASELINE)
    if _digest(baseline.report) != baseline.report_digest or json_from_record(baseline).encode() != content:
        raise IntegrityError(f"{path}: the baseline is not the report that was accepted", fix="restore it")
    return baseline, digest_of_bytes(content)


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle."""
    return (path / MANIFEST).is_file()


def has_baseline(bundle: Path) -> bool:
    """Whether a bundle's folder has a baseline."""
    return (bundle / BASELINE).is_file()


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
