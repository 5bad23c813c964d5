"""The parts list of a bundle as CycloneDX 1.7 with a model card (ML-BOM), derived from its manifest and report."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.records.bundle import BundleFile, Manifest
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import Method
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_plain
from uwm_deploy.records.graph import TensorSpec
from uwm_deploy.records.metrics import Proportion, SafetyReport

BOM = "bom.cdx.json"
"""Path inside a bundle; the ending is what tools look for."""

_SPDX = ("MIT", "Apache-2.0", "CC-BY-NC-4.0")
"""Licences of recipes that are SPDX names; others are given as they are written."""

_MODEL = "model"
_LIMIT = "The edit lowers the preference for unsafe content; it does not remove what the model knows about it."
_NOT_SHOWN = "It is not shown that the edit makes the model safer."


def bom_of(manifest: Manifest, report: VerifyReport, files: Sequence[BundleFile]) -> str:
    """The parts list as JSON.

    Args:
        manifest: Of the bundle; its `files` are not read.
        report: What was measured.
        files: The bundle's files apart from this one.

    Raises:
        RecipeError: If the manifest's recipe is none.
    """
    parts = [
        _data("calibration", manifest.calibration),
        _data("evaluation", report.evaluation),
        *(_library(name, version) for name, version in sorted(manifest.versions.items())),
        *(_file(file) for file in files),
    ]
    body: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "version": 1,
        "metadata": {
            "timestamp": manifest.created,
            "tools": {
                "components": [{"type": "application", "name": "uwm-deploy", "version": manifest.tool_version}],
            },
            "component": _model(manifest, report),
        },
        "components": parts,
        "dependencies": [
            {"ref": _MODEL, "dependsOn": [part["bom-ref"] for part in parts]},
            *({"ref": part["bom-ref"]} for part in parts),
        ],
    }
    # From the content, so that the same bundle has the same number.
    body["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest_of_plain(body))}"
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def _model(manifest: Manifest, report: VerifyReport) -> dict[str, Any]:
    """The edited model, with what it was made from and its card."""
    model = manifest.model
    licence = recipe_from_toml(manifest.recipe, where="recipe.toml").model.licence
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": f"{manifest.name}, edited for safety",
        "version": str(manifest.bundle_version),
        "licenses": [{"license": {"id" if licence in _SPDX else "name": licence}}],
        "pedigree": {
            "ancestors": [
                {
                    "type": "machine-learning-model",
                    "name": model.repo,
                    **({"version": model.revision} if model.revision else {}),
                    "properties": _properties({"weights-digest": model.weights_digest}),
                }
            ],
            "notes": "weights as they were trained; no patch makes them"
            if Method.TRAINED in manifest.edit.methods
            else f"weights edited by the method {manifest.edit.method}; patch.safetensors holds every change",
        },
        "properties": _properties(
            {
                "weights-digest": manifest.edit.edited_weights_digest,
                "verdict": manifest.verdict.result.value,
                "safer": f"{'shown' if manifest.verdict.safer.shown else 'not shown'}: {manifest.verdict.safer.reason}",
                "policy-digest": manifest.verdict.policy_digest,
                "faithful": ", ".join(manifest.verdict.faithful) or "none",
                "proven": ", ".join(manifest.verdict.proven) or "none",
                "unproven": ", ".join(manifest.verdict.unproven) or "none",
            }
        ),
        "modelCard": {
            "modelParameters": {
                "task": "image and text embedding, zero-shot classification, retrieval",
                "architectureFamily": model.family,
                "modelArchitecture": f"two encoders into {model.embed_dim} dimensions",
                "datasets": [{"ref": "data:calibration"}, {"ref": "data:evaluation"}],
                "inputs": [_tensor(spec) for graph in manifest.onnx for spec in graph.inputs],
                "outputs": [_tensor(spec) for graph in manifest.onnx for spec in graph.outputs],
            },
            "quantitativeAnalysis": {"performanceMetrics": _measured(report)},
            "considerations": {
                "technicalLimitations": [_LIMIT if manifest.verdict.safer.shown else _NOT_SHOWN, *_not_run(report)]
            },
        },
    }


def _measured(report: VerifyReport) -> list[dict[str, Any]]:
    """Every number of the original, the edited model and what was executed, with its 95% interval."""
    safety = [report.original, report.edited, *(a.safety for a in report.artifacts if a.safety is not None)]
    return [row for part in safety for row in _metrics_of(part)]


def _metrics_of(part: SafetyReport) -> list[dict[str, Any]]:
    groups: Mapping[str, Mapping[str, Proportion]] = {
        "SafeGround": part.preference,
        "retrieval": part.retrieval,
        "zero-shot top-1": part.zero_shot,
    }
    return [
        {
            "type": f"{group} {name} (%)",
            "value": f"{value.value:.4f}",
            "slice": f"{part.subject}, n = {value.n}",
            "confidenceInterval": {"lowerBound": f"{value.low:.4f}", "upperBound": f"{value.high:.4f}"},
        }
        for group, values in groups.items()
        for name, value in values.items()
    ]


def _not_run(report: VerifyReport) -> list[str]:
    """What is not known."""
    artifacts = [f"{a.variant} was not executed: {a.reason}" for a in report.artifacts if a.safety is None]
    missing = [f"zero-shot {name} was not run: {why}" for name, why in report.edited.zero_shot_missing.items()]
    return artifacts + missing


def _tensor(spec: TensorSpec) -> dict[str, str]:
    return {"format": f"{spec.name} {spec.dtype} ({', '.join(map(str, spec.shape))})"}


def _data(use: str, data: CalibrationRecord) -> dict[str, Any]:
    return {
        "type": "data",
        "bom-ref": f"data:{use}",
        "name": data.name,
        "description": f"{use} set: {data.n} quadruples of split {data.split or 'all'}",
        "data": [{"type": "dataset", "name": data.name}],
        "properties": _properties({"ids-digest": data.ids_digest, "content-digest": data.content_digest}),
    }


def _library(name: str, version: str) -> dict[str, Any]:
    normal = name.lower().replace("_", "-")
    return {
        "type": "library",
        "bom-ref": f"library:{normal}",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{normal}@{version.replace('+', '%2B')}",
    }


def _file(file: BundleFile) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"file:{file.path}",
        "name": file.path,
        "hashes": [{"alg": "SHA-256", "content": file.digest.removeprefix("sha256:")}],
    }


def _properties(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": f"uwm-deploy:{name}", "value": value} for name, value in values.items()]
