"""Accepting a report as the baseline that later ones are compared with."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from uwm_deploy.bundle.sign import Resigning, seal_for
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.baseline import accepted, is_bundle, write_baseline
from uwm_deploy.pipeline.judge import judge_with, report_at
from uwm_deploy.pipeline.shipping import note_signature
from uwm_deploy.recipes.resolve import policy_of
from uwm_deploy.records.model import Digest
from uwm_deploy.records.verdict import Result, Verdict
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
    seal = seal_for(signing or Resigning(), at)
    if not is_bundle(at) and (seal.sign or seal.public_key):
        raise InputError(f"{at} is no bundle, so it has no signature", fix="leave the keys out")
    policy, policy_digest = policy_of(policy_name)
    report, digest = report_at(path)
    verdict = judge_with(dataclasses.replace(policy, baseline=()), policy_digest, None)(report, digest)
    if verdict.result is not Result.PASS:
        return verdict, None
    baseline = accepted(report, verdict, by=by, reason=reason)
    digest = write_baseline(at, baseline, partial(bundle_from_parts, sign=seal.sign), public_key=seal.public_key)
    note_signature(at, seal, reporter)
    return verdict, digest
