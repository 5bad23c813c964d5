"""The gate with its policy and, where there is one, the accepted report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from uwm_deploy.bundle.downstream import downstream_in, read_downstream
from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle, open_bundle
from uwm_deploy.errors import InputError, unreadable
from uwm_deploy.pipeline.baseline import baseline_in, read_baseline
from uwm_deploy.pipeline.policy_lock import kept_lock
from uwm_deploy.pipeline.stored import reference_of
from uwm_deploy.recipes.policy import Policy
from uwm_deploy.recipes.resolve import policy_of
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import (
    digest_of_bytes,
)
from uwm_deploy.records.graph import EXPORTED
from uwm_deploy.records.model import Digest
from uwm_deploy.records.verdict import Baseline, Check, Verdict
from uwm_deploy.stages.gate.binding import Beside
from uwm_deploy.stages.gate.gate import gate

Judge = Callable[..., Verdict]
"""From a report and the digest of its file to the verdict."""


Execute = Callable[[Bundle, VerifyReport], tuple[Check, ...]]
"""From a bundle and its report to what executing its artifacts shows."""


def judge_with(policy: Policy, policy_digest: Digest, baseline: tuple[Baseline, Digest] | None) -> Judge:
    """The gate with its policy and, where there is one, the accepted report."""
    known, digest = baseline or (None, "")
    return partial(_judged, policy=policy, policy_digest=policy_digest, baseline=known, baseline_digest=digest)


def _judged(report: VerifyReport, report_digest: Digest, **settings: Any) -> Verdict:
    return gate(report, report_digest=report_digest, **settings)


def _baseline_for(bundle: Bundle | None, given: Path | None) -> tuple[Baseline, Digest] | None:
    """The baseline that was given, else the one inside the bundle."""
    if given is not None:
        return read_baseline(given)
    return baseline_in(bundle) if bundle is not None else None


def report_at(path: Path) -> tuple[VerifyReport, Digest]:
    """Report of a bundle or a `verify.json`, and the digest of its file.

    Raises:
        InputError: If there is no report.
        IntegrityError: If the bundle or the report was changed.
    """
    if path.is_dir():
        return report_of_bundle(open_bundle(path, allow_failed=True))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(str(path), error, fix="pass a bundle or a verify.json", kind=InputError) from error
    return record_from_json(VerifyReport, content, where=path.name), digest_of_bytes(content)


def report_of_bundle(bundle: Bundle) -> tuple[VerifyReport, Digest]:
    """What was measured of a bundle, and the digest of that file."""
    content = bundle.read(BundleLayout.REPORT)
    return record_from_json(VerifyReport, content, where=BundleLayout.REPORT), digest_of_bytes(content)


def beside_in(bundle: Bundle) -> Beside:
    """What the report of a bundle lies beside.

    Raises:
        IntegrityError: If the embeddings in the bundle cannot be read.
    """
    manifest, artifacts = bundle.manifest, dict[str, dict[str, Digest]]()
    for graph in manifest.onnx:
        artifacts.setdefault(EXPORTED, {})[graph.tower.value] = graph.digest
    for engine in manifest.engines:
        artifacts.setdefault(engine.variant, {})[engine.tower.value] = engine.digest
    return Beside(
        model=manifest.model,
        edited_weights_digest=manifest.edit.edited_weights_digest,
        artifacts=artifacts,
        embedded=(reference_of(bundle, "original"), reference_of(bundle)),
    )


def judge_file(
    path: Path,
    policy_name: str,
    baseline: Path | None = None,
    *,
    public_key: Path | None = None,
    min_bundle_version: int = 0,
    execute: Execute | None = None,
    lock: Path | None = None,
    downstream: Sequence[Path] = (),
) -> Verdict:
    """Judges the report of a bundle or a `verify.json`; nothing is written.

    Args:
        path: Bundle or file.
        policy_name: Name or file.
        baseline: Accepted report to compare with.
        public_key: Whose signature the bundle must have.
        min_bundle_version: Oldest version the bundle may have.
        execute: Runs the bundle's artifacts here; None leaves that out.
        lock: Criteria that were written down before the run, and must be these.
        downstream: Reports of captions and pictures behind the edited towers, before those of the bundle.

    Raises:
        InputError: If there is no report, or the baseline was measured on something else.
        EvidenceError: If the criteria are not those that were locked.
        IntegrityError: If the bundle, the report or the baseline was changed, or the bundle is not signed or too old.
    """
    policy = policy_of(policy_name)
    behind = read_downstream(downstream)

    def locked(verdict: Verdict, report: VerifyReport, measured: str = "") -> Verdict:
        if lock is None:
            return verdict
        line = kept_lock(lock, (policy[0].name, policy[1]), report, measured)
        return dataclasses.replace(verdict, notes=(*verdict.notes, line))

    if path.is_dir():  # the signature comes first: the baseline lies inside the bundle
        bundle = open_bundle(path, allow_failed=True, public_key=public_key, min_bundle_version=min_bundle_version)
        report, digest = report_of_bundle(bundle)
        behind.check_of(report)
        beside = dataclasses.replace(beside_in(bundle), executed=execute(bundle, report) if execute else ())
        judge = judge_with(*policy, _baseline_for(bundle, baseline))
        known = {found.kind: found for found in (*downstream_in(bundle, report), *behind.reports)}
        verdict = judge(
            report, digest, earlier=bundle.manifest.verdict, beside=beside, downstream=tuple(known.values())
        )
        return locked(verdict, report, bundle.manifest.measured or bundle.manifest.created)
    if public_key is not None or min_bundle_version:
        raise InputError(f"{path} is no bundle, so it has neither signature nor version", fix="pass the bundle")
    if execute is not None:
        raise InputError(f"{path} is no bundle, so there is nothing to execute", fix="pass the bundle")
    report, digest = report_at(path)
    behind.check_of(report)
    verdict = judge_with(*policy, _baseline_for(None, baseline))(report, digest, downstream=behind.reports)
    return locked(verdict, report)


def judge_of_bundle(bundle: Bundle, policy_name: str) -> Judge:
    """The gate with a policy and the bundle's own baseline, if it has one."""
    judge = judge_with(*policy_of(policy_name), baseline_in(bundle))

    def judged(report: VerifyReport, digest: Digest, **more: Any) -> Verdict:
        return judge(report, digest, downstream=downstream_in(bundle, report), **more)

    return judged
