"""The evidence of a bundle as an in-toto statement with SLSA provenance: what was made, from what, where, and the verdict.

Specifications: in-toto Statement v1, SLSA provenance v1. Nothing in it is new: it says what manifest and report say, in the
form that supply-chain tools read. A digest that is not over a file's bytes stands under a name of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from uwm_deploy.records.bundle import BundleFile, Manifest
from uwm_deploy.records.codec import plain_from_record
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.evidence import ArtifactEvidence, VerifyReport
from uwm_deploy.records.graph import EngineArtifact
from uwm_deploy.records.model import Digest

STATEMENT = "evidence/statement.json"
"""Path inside a bundle."""

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:uwm-deploy:build:v1"
"""Names the meaning of the parameters; docs/reference/bundle.md."""

_SUBJECTS = ("onnx/", "engines/", "patch.safetensors", "tokenizer.json")
"""What the statement is about: everything that is loaded to serve, and the edit."""

_BYPRODUCTS = ("reports/", "evidence/", "baseline.json")


def statement_of(manifest: Manifest, report: VerifyReport, files: Sequence[BundleFile]) -> str:
    """The statement as JSON.

    Args:
        manifest: Of the bundle; its `files` are not read.
        report: What was measured.
        files: The bundle's files apart from those that are derived from them.
    """
    body = {
        "_type": STATEMENT_TYPE,
        "subject": [_resource(file) for file in files if file.path.startswith(_SUBJECTS)],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": _asked(manifest),
                "internalParameters": {
                    "engines": [_engine(engine) for engine in manifest.engines],
                    "executed": [_executed(artifact) for artifact in report.artifacts],
                    "verdict": _verdict(manifest),
                    "versions": dict(manifest.versions),
                },
                "resolvedDependencies": _sources(manifest, report),
            },
            "runDetails": {
                "builder": {"id": "urn:uwm-deploy", "version": {"uwm-deploy": manifest.tool_version}},
                "metadata": {"finishedOn": manifest.created},
                "byproducts": [_resource(file) for file in files if file.path.startswith(_BYPRODUCTS)],
            },
        },
    }
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def _resource(file: BundleFile) -> dict[str, Any]:
    return {"name": file.path, "digest": {"sha256": _hex(file.digest)}}


def _hex(digest: Digest) -> str:
    return digest.removeprefix("sha256:")


def _asked(manifest: Manifest) -> dict[str, Any]:
    """What whoever started the build chose."""
    edit = manifest.edit
    return {
        "model": {"name": manifest.model.name, "repo": manifest.model.repo, "revision": manifest.model.revision},
        "method": edit.method,
        "settings": {
            tower: {"keepMass": setting.keep_mass, "factor": setting.factor, "selection": setting.selection.value}
            for tower, setting in edit.first.settings.items()
        },
        **_closed_form(edit),
        "variants": sorted({engine.variant for engine in manifest.engines}),
        "recipe": {"sha256": _hex(manifest.recipe_digest)},
        "bundleVersion": manifest.bundle_version,
    }


def _closed_form(edit: EditRecord) -> dict[str, Any]:
    step = edit.closed_form
    if step is None or step.axis is None:
        return {}
    setting = plain_from_record(step.axis.setting) if step.axis.setting else {}
    return {"closedForm": {"method": step.method.value, "placement": step.axis.placement.value, "setting": setting}}


def _engine(engine: EngineArtifact) -> dict[str, Any]:
    return {
        "variant": engine.variant,
        "tower": engine.tower.value,
        "target": engine.target.value,
        "precision": engine.precision,
        "digest": engine.digest,
        "madeFrom": engine.onnx_digest,
        "builtOn": engine.built_on,
        "versions": dict(engine.versions),
        "settings": dict(engine.settings),
    }


def _executed(artifact: ArtifactEvidence) -> dict[str, Any]:
    """Where an artifact ran, down to device and driver, or why it did not."""
    return {
        "variant": artifact.variant,
        "evidence": artifact.evidence.value,
        "reason": artifact.reason,
        "where": dict(artifact.where),
        "digests": dict(artifact.artifact_digests),
    }


def _verdict(manifest: Manifest) -> dict[str, Any]:
    verdict = manifest.verdict
    return {
        "result": verdict.result.value,
        "safer": {"shown": verdict.safer.shown, "reason": verdict.safer.reason},
        "faithful": list(verdict.faithful),
        "proven": list(verdict.proven),
        "unproven": list(verdict.unproven),
        "failed": list(verdict.failed),
        "inconclusive": list(verdict.inconclusive),
        "policy": {"name": verdict.policy, "sha256": _hex(verdict.policy_digest)},
        "report": {"sha256": _hex(verdict.report_digest)},
        "baseline": verdict.baseline_digest,
    }


def _sources(manifest: Manifest, report: VerifyReport) -> list[dict[str, Any]]:
    """Source weights and data sets."""
    model = manifest.model
    weights: dict[str, Any] = {
        "name": f"model {model.name}",
        "digest": {"sha256-of-weights": _hex(model.weights_digest)},
        "annotations": {"repo": model.repo, "revision": model.revision, "family": model.family},
    }
    return [weights, _data("calibration", manifest.calibration), _data("evaluation", report.evaluation)]


def _data(use: str, data: CalibrationRecord) -> dict[str, Any]:
    digest: Mapping[str, str] = {
        "sha256-of-ids": _hex(data.ids_digest),
        "sha256-of-content": _hex(data.content_digest),
    }
    return {"name": f"{use} set {data.name}", "digest": digest, "annotations": {"split": data.split, "items": data.n}}
