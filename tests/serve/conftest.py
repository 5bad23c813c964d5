"""One small bundle, its image engine without the edit, and a running server."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.serve.server import Server, started, wait
from tests.small_build import build_small
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.edits.patch import Patch
from uwm_deploy.edits.proof import promised_by
from uwm_deploy.graphs.stored_weights import Replacement
from uwm_deploy.pipeline.refit_graphs import Swap, held_tensors, refit_engine, reverted, without_edit
from uwm_deploy.pipeline.request import Request
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Result, Verdict
from uwm_deploy.serve.repository import write_repository

VARIANT = "onnxruntime-fp32"


@pytest.fixture(scope="session")
def request_of_build(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A small build, of which the request says where everything is."""
    return build_small(tmp_path_factory)[0]


@pytest.fixture(scope="session")
def bundle(request_of_build: Request) -> Path:
    """A bundle that passes."""
    assert request_of_build.out is not None
    return request_of_build.out


@pytest.fixture(scope="session")
def unedited(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the same image engine without the edit: what must never be served."""
    folder, opened = tmp_path_factory.mktemp("unedited"), open_bundle(bundle)
    edit, patch = opened.manifest.edit, Patch.from_file(bundle / "patch.safetensors")
    held = held_tensors(opened.manifest.onnx, bundle / "onnx", promised_by(edit))
    source = without_edit(held, edit, patch)
    changes = {name: Replacement(before=held[name], after=source[name]) for name in source}
    engine = opened.engines(VARIANT)[TowerName.IMAGE]
    record, nothing = reverted(edit, patch)
    swap = Swap(old=edit, old_patch=patch, new=record, new_patch=nothing, content=b"", changes=changes)
    graphs = (bundle / "onnx" / "image.onnx", bundle / "onnx" / "image.onnx")
    refit_engine(engine, bundle / "engines" / VARIANT, folder, swap, graphs=graphs, sample=np.empty(0))
    return folder / engine.file


@pytest.fixture(scope="session")
def failed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a verdict that is no pass."""
    verdict = dataclasses.replace(open_bundle(bundle).manifest.verdict, result=Result.FAIL, proven=())
    return repacked(bundle, tmp_path_factory.mktemp("failed") / "bundle", verdict=verdict)


def repacked(bundle: Path, out: Path, *, verdict: Verdict | None = None, bundle_version: int = 0) -> Path:
    """The same bundle with another verdict or version."""
    manifest = open_bundle(bundle).manifest
    parts: dict[str, Path | bytes] = {file.path: bundle / file.path for file in manifest.files}
    if verdict:
        parts["reports/verdict.json"] = json_from_record(verdict).encode()
    changed = dataclasses.replace(manifest, verdict=verdict or manifest.verdict, bundle_version=bundle_version)
    bundle_from_parts(out, changed, parts)
    return out


@pytest.fixture(scope="session")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as a repository."""
    path = tmp_path_factory.mktemp("repository") / "models"
    write_repository(open_bundle(bundle), path)
    return path


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that serves it."""
    with started(tmp_path_factory.mktemp("server"), repository) as found:
        yield wait(found)


def as_plans(bundle: Path, out: Path, capability: str, bundle_version: int = 0) -> Path:
    """The bundle as a machine with a GPU would have written it; what its plans hold does not matter here."""
    manifest, variant = open_bundle(bundle).manifest, "tensorrt-fp32"
    report = record_from_json(VerifyReport, (bundle / "reports" / "verify.json").read_bytes(), where="verify.json")
    where = {"compute_capability": capability, "device": "a GPU"}
    artifacts = tuple(
        dataclasses.replace(a, variant=variant, where=where) if a.variant == VARIANT else a for a in report.artifacts
    )
    content = json_from_record(dataclasses.replace(report, artifacts=artifacts)).encode()
    judged = {variant if name == VARIANT else name: part for name, part in manifest.verdict.judged.items()}
    verdict = dataclasses.replace(
        manifest.verdict, proven=(variant,), judged=judged, report_digest=digest_of_bytes(content), unproven=()
    )
    engines = tuple(
        dataclasses.replace(e, variant=variant, target=Target.TENSORRT, file=f"{e.tower.value}.plan")
        for e in manifest.engines
        if e.variant == VARIANT
    )
    parts: dict[str, Path | bytes] = {
        file.path: bundle / file.path for file in manifest.files if not file.path.startswith("engines/")
    }
    parts |= {f"engines/{variant}/{e.file}": bundle / "engines" / VARIANT / f"{e.tower.value}.onnx" for e in engines}
    parts |= {"reports/verify.json": content, "reports/verdict.json": json_from_record(verdict).encode()}
    changed = dataclasses.replace(manifest, engines=engines, verdict=verdict, bundle_version=bundle_version)
    bundle_from_parts(out, changed, parts)
    return out
