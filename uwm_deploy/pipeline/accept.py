"""Accepting a report as the baseline that later ones are compared with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from uwm_deploy.bundle.downstream import downstream_in
from uwm_deploy.bundle.open import is_bundle, open_bundle
from uwm_deploy.bundle.sign import Resigning, seal_for
from uwm_deploy.bundle.write import rewriting
from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.baseline import accepted, write_baseline, write_baseline_into
from uwm_deploy.pipeline.judge import judge_with, report_at, report_of_bundle
from uwm_deploy.pipeline.shipping import note_signature
from uwm_deploy.recipes.resolve import policy_of
from uwm_deploy.records.model import Digest
from uwm_deploy.records.verdict import Baseline, Result, Verdict
from uwm_deploy.stages.job import Notes


def accept_baseline(
    path: Path,
    policy_name: str,
    at: Path,
    *,
    by: str,
    reason: str,
    reporter: Notes,
    signing: Resigning | None = None,
) -> tuple[Verdict, Digest | None]:
    """Stores a report as the baseline, if it passes the policy, limits since the baseline apart.

    Args:
        path: Bundle or `verify.json`.
        policy_name: Name or file.
        at: Folder or bundle that the baseline is stored in.
        by: Who accepts it.
        reason: Why.
        reporter: Progress.
        signing: What is to become of the signature of the bundle `at`.

    Returns:
        The verdict, and the digest of the baseline's file; None when the report does not pass and nothing was stored.

    Raises:
        InputError: If there is no report; if `at` is signed and would lose that unasked, or is no bundle and has a key.
        IntegrityError: If the bundle or the report was changed, or is not signed by the right key.
    """
    asked = signing or Resigning()
    if not is_bundle(at):
        seal = seal_for(asked, at)
        if seal.sign or seal.public_key:
            raise InputError(f"{at} is no bundle, so it has no signature", fix="leave the keys out")
        baseline, verdict = _accepted(path, policy_name, by, reason)
        return verdict, write_baseline(at, baseline) if baseline else None
    with rewriting(at) as place:
        seal = seal_for(asked, at)
        baseline, verdict = _accepted(path, policy_name, by, reason)
        if baseline is None:
            return verdict, None
        bundle = open_bundle(place.path, allow_failed=True, public_key=seal.public_key)
        digest = write_baseline_into(place, bundle, baseline, sign=seal.sign)
        note_signature(at, seal, reporter)
    return verdict, digest


def _accepted(path: Path, policy_name: str, by: str, reason: str) -> tuple[Baseline | None, Verdict]:
    """The report as a baseline, if it passes, and the verdict on it."""
    policy, policy_digest = policy_of(policy_name)
    judge = judge_with(dataclasses.replace(policy, baseline=()), policy_digest, None)
    if path.is_dir():
        bundle = open_bundle(path, allow_failed=True)
        report, digest = report_of_bundle(bundle)
        verdict = judge(report, digest, downstream=downstream_in(bundle, report))
    else:
        report, digest = report_at(path)
        verdict = judge(report, digest)
    if verdict.result is not Result.PASS:
        return None, verdict
    return accepted(report, verdict, by=by, reason=reason), verdict
