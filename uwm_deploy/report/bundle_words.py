"""A bundle in words, as `inspect` shows it."""

from __future__ import annotations

from typing import Any

from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.training import TrainingRecord
from uwm_deploy.report.edit_words import entries_line, head_line, method_line
from uwm_deploy.report.findings import result_words


def described_bundle(manifest: Manifest, *, signed: bool, training: TrainingRecord | None) -> dict[str, Any]:
    """What a bundle holds: names to words, in the order in which they are shown.

    Args:
        manifest: Of the bundle.
        signed: Whether it has a signature, which was not verified.
        training: How its model was trained; None for an edit without training.
    """
    verdict, model = manifest.verdict, manifest.model
    return {
        "bundle": manifest.name,
        "bundle version": manifest.bundle_version,
        "signature": "there, not verified" if signed else "none",
        "verdict": result_words(verdict),
        "safer": f"{'shown' if verdict.safer.shown else 'not shown'}: {verdict.safer.reason}",
        "faithful": ", ".join(verdict.faithful) or "none",
        "proven": ", ".join(verdict.proven) or "none",
        "unproven": ", ".join(verdict.unproven) or "none",
        "policy": f"{verdict.policy} {verdict.policy_digest[:19]}",
        "model": f"{model.family} {model.repo} {model.revision}".strip(),
        "original weights": model.weights_digest,
        "edited weights": manifest.edit.edited_weights_digest,
        "method": method_line(manifest.edit),
        **({"trained by": training_line(training)} if training else {}),
        "edited entries": entries_line(manifest.edit),
        "embedding spaces": dict(manifest.spaces),
        "calibration": f"{manifest.calibration.name}, {manifest.calibration.n} quadruples",
        "safety head": head_line(manifest.head),
        "created": f"{manifest.created} by uwm-deploy {manifest.tool_version}",
        "versions": dict(manifest.versions),
        "files": [f"{f.digest[7:19]}  {f.size_bytes:>10}  {f.path}" for f in manifest.files],
    }


def training_line(training: TrainingRecord) -> str:
    """How a model was trained."""
    best = f"best of {len(training.epochs)} epochs: {training.best_epoch}"
    data = f"{training.n_training} quadruples of {training.calibration.name}"
    return f"{training.settings.method.value} from {training.base.name}, {data}, {best}"
