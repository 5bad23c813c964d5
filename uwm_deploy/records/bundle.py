"""The manifest of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact
from uwm_deploy.records.head import SafetyHead
from uwm_deploy.records.model import Digest, ModelRef
from uwm_deploy.records.shape import LATER
from uwm_deploy.records.verdict import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleFile:
    """One file of a bundle: POSIX path relative to the bundle, size, digest of its bytes."""

    path: str
    size_bytes: int
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`manifest.json` of a bundle; every other file of the bundle is listed in `files`.

    Attributes:
        recipe: The recipe's text, verbatim, so that the build can be repeated.
        onnx: The exported graphs.
        converted: Graphs in lower precision that engines were compiled from; only their records are in the bundle.
        engines: Every compiled engine; `unproven` variants are refused by the runtime.
        verdict: Also in `reports/verdict.json`.
        refitted_from: Digest of the manifest of the bundle whose edit was replaced by this one's; empty after a build.
        bundle_version: Counts releases, so that an older one can be refused; 0 when none was given.
        measured: ISO time at which its measurements began, which may be long before it was written; empty in bundles of
            earlier releases.
        head: The safety head in the image graphs and engines; None without one.
        spaces: Variant to the id of the space that it embeds into; filled in when it is written, computed again when it is
            opened.
    """

    name: str
    tool_version: str
    created: str
    model: ModelRef
    edit: EditRecord
    calibration: CalibrationRecord
    recipe: str
    recipe_digest: Digest
    onnx: tuple[OnnxArtifact, ...]
    engines: tuple[EngineArtifact, ...]
    verdict: Verdict
    versions: Mapping[str, str]
    files: tuple[BundleFile, ...]
    converted: tuple[OnnxArtifact, ...] = ()
    refitted_from: Digest = ""
    bundle_version: int = 0
    measured: str = field(default="", metadata=LATER)
    head: SafetyHead | None = None
    spaces: Mapping[str, str] = field(default_factory=dict)
