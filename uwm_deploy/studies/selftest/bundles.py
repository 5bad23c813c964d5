"""Faults after the verdict: bundles that are not what was judged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import MANIFEST, engine_path, open_bundle
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.fingerprint import digest_of_onnx
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.policy import policy_from_toml
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.files import digest_of_bytes, digest_of_plain
from uwm_deploy.records.graph import EngineArtifact
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Result
from uwm_deploy.stages.gate.gate import gate
from uwm_deploy.studies.selftest import surgery
from uwm_deploy.studies.selftest.artifacts import compiled_with, noise_in_weights
from uwm_deploy.studies.selftest.honest_builds import POLICY, Build, HonestBuild


def _copy(world: HonestBuild, folder: Path) -> Path:
    target = folder / "bundle"
    shutil.copytree(world.bundle, target)
    return target


def _packed(world: HonestBuild, folder: Path, manifest: Manifest, changed: Mapping[str, Path | bytes]) -> Path:
    """A bundle that was written by the package stage, with other parts."""
    parts: dict[str, Path | bytes] = {f.path: world.bundle / f.path for f in manifest.files}
    out = folder / "bundle"
    bundle_from_parts(out, manifest, {**parts, **changed})
    return out


def _manifest(world: HonestBuild) -> Manifest:
    return open_bundle(world.bundle).manifest


def _with_engines(manifest: Manifest, build: Build) -> tuple[Manifest, dict[str, Path | bytes]]:
    """A manifest whose engines are those of a build, and their files."""
    engines: list[EngineArtifact] = []
    files: dict[str, Path | bytes] = {}
    for engine in manifest.engines:
        path = build.engines[engine.tower]
        engines.append(dataclasses.replace(engine, digest=digest_of_onnx(path, "")))
        files[engine_path(engine)] = path
    return dataclasses.replace(manifest, engines=tuple(engines)), files


def engine_flipped(world: HonestBuild, folder: Path) -> Path:
    """One bit of an engine."""
    out = _copy(world, folder)
    path = out / engine_path(world.engines[TowerName.IMAGE])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return out


def manifest_edited(world: HonestBuild, folder: Path) -> Path:
    """Another factor in the manifest, written as the package stage would write it."""
    out = _copy(world, folder)
    body = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    for tensor in body["edit"]["tensors"]:
        tensor["factor"] = -2.0
    text = json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (out / MANIFEST).write_text(text, encoding="utf-8")
    return out


def tokenizer_swapped(world: HonestBuild, folder: Path) -> Path:
    """The tokenizer of another model, listed with its own digest."""
    body = json.loads(world.original.tokenizer_json)
    body["added_tokens"] = body["added_tokens"][::-1]
    return _packed(world, folder, _manifest(world), {"tokenizer.json": json.dumps(body).encode()})


def file_added(world: HonestBuild, folder: Path) -> Path:
    """A library beside the engine."""
    out = _copy(world, folder)
    (out / "engines" / "plugin.so").write_bytes(b"\x7fELF")
    return out


def report_edited(world: HonestBuild, folder: Path) -> Path:
    """A report with better numbers than were measured, listed with its own digest."""
    better = dataclasses.replace(world.report, calibration_overlap=0, edit_worst=())
    return _packed(world, folder, _manifest(world), {BundleLayout.REPORT: json_from_record(better).encode()})


def report_of_another_engine(world: HonestBuild, folder: Path) -> Path:
    """The engine of the original model, whole and listed, with the verdict about the edited one's."""
    changes = {t: surgery.with_weights(world.original.tower(t).graph_module()) for t in TowerName}
    manifest, files = _with_engines(_manifest(world), compiled_with(changes)(world, folder))
    return _packed(world, folder, manifest, files)


def policy_loosened(world: HonestBuild, folder: Path) -> Path:
    """An engine that the policy refuses, packed with the verdict of a policy of the same name that does not."""
    build = noise_in_weights(world, folder)
    report = world.measured(build, folder)
    text, where = resources.read_toml("ci", POLICY)
    policy = policy_from_toml(text.replace("at_least = 0.99999", "at_least = 0.9"), where=where)
    content = json_from_record(report).encode()
    verdict = gate(report, policy, policy_digest=digest_of_plain(policy.name), report_digest=digest_of_bytes(content))
    if verdict.result is not Result.PASS:
        raise ContractError("the loosened policy does not let the engine pass", fix="report this")
    manifest, files = _with_engines(_manifest(world), build)
    files |= {BundleLayout.REPORT: content, BundleLayout.VERDICT: json_from_record(verdict).encode()}
    return _packed(world, folder, dataclasses.replace(manifest, verdict=verdict), files)
