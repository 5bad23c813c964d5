"""Stage `package`: everything that ships, as one bundle. Its own folder keeps the manifest and the model's card."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

from uwm_deploy import __version__
from uwm_deploy.bundle.head import ITEMS, PLACE, TEXTS, WEIGHTS
from uwm_deploy.bundle.layout import BundleLayout, tower_record
from uwm_deploy.bundle.open import engine_paths, open_bundle
from uwm_deploy.bundle.replace import lost_signature, refuse_foreign_folder
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.data.evaluation import place_from
from uwm_deploy.edits.canary_files import canary_file, raw_canary_file
from uwm_deploy.errors import UwmError
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record, read_record, write_record
from uwm_deploy.records.edit import EditRecord, ScoreRecord
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, Precision
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.replacing import tidied
from uwm_deploy.records.verdict import Result, Verdict
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.service import Serving
from uwm_deploy.runtime.versions import BUILD_PACKAGES, RUN_PACKAGES, versions
from uwm_deploy.safeground.canaries import CANARIES
from uwm_deploy.stages.job import Job, Made


def make(job: Job, out: Path) -> None:
    """Writes the bundle, opens it as a server would, and keeps its manifest.

    Raises:
        InputError: If there is something else in its place.
        IntegrityError: If what was written does not open, or what runs does not answer like the edited model.
    """
    plan = job.plan
    refuse_foreign_folder(plan.out)
    if told := lost_signature(plan.out):
        job.notes.line(told)
    manifest = _manifest(job)
    report = read_record(VerifyReport, job.folder.report)
    parts = _parts(job, manifest) | {BundleLayout.CARD: _card(job, manifest, report, bundle=True).encode()}
    written = bundle_from_parts(plan.out, manifest, parts)
    _open_as_served(plan.out, manifest.verdict)
    write_record(out / job.folder.packaged.name, written)
    (out / BundleLayout.CARD).write_text(_card(job, manifest, report, bundle=False), encoding="utf-8")


def _open_as_served(path: Path, verdict: Verdict) -> None:
    """Checks every digest and, where something is proven, that it answers; a bundle that nobody can open is not shipped."""
    if verdict.result is not Result.PASS or not verdict.proven:
        open_bundle(path, allow_failed=True)
        return
    SafeEncoder.open(path, serving=Serving(selftest_rows=CANARIES)).close()


def is_there(job: Job, folder: Path) -> bool:
    """Whether the bundle is still the one that was written, and its card is what would be written now.

    A baseline or a signature that was put in since is no change of it; another verdict is. Cards are views, whose code no
    stage depends on, so the text itself is compared.
    """
    tidied(job.plan.out)
    try:
        there = open_bundle(job.plan.out, allow_failed=True).manifest
    except UwmError:
        return False
    written = read_record(Manifest, folder / job.folder.packaged.name)
    card = _card(job, written, read_record(VerifyReport, job.folder.report), bundle=False)
    return _core(there) == _core(written) and card == (folder / BundleLayout.CARD).read_text(encoding="utf-8")


def _core(manifest: Manifest) -> Manifest:
    return dataclasses.replace(manifest, created="", files=(), spaces={})


def _manifest(job: Job) -> Manifest:
    plan, folder = job.plan, job.folder
    edit, score = read_record(EditRecord, folder.edit_record), read_record(ScoreRecord, folder.score_record)
    return Manifest(
        name=plan.recipe.name,
        tool_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        measured=job.inputs["verify"][0].begun,
        model=edit.model,
        edit=edit,
        calibration=score.calibration,
        recipe=plan.recipe_text,
        recipe_digest=digest_of_bytes(plan.recipe_text.encode()),
        onnx=_graphs(folder.export),
        engines=tuple(
            read_record(EngineArtifact, tower_record(made.folder, tower))
            for made in job.inputs["compile"]
            for tower in TowerName
        ),
        converted=tuple(graph for made in _converted(job) for graph in _graphs(made.folder)),
        verdict=read_record(Verdict, folder.verdict),
        versions=versions(BUILD_PACKAGES + RUN_PACKAGES),
        files=(),
        bundle_version=plan.recipe.bundle_version,
        head=plan.head.record if plan.head else None,
    )


def _converted(job: Job) -> tuple[Made, ...]:
    return job.inputs.get("convert", ())


def _graphs(folder: Path) -> tuple[OnnxArtifact, ...]:
    return tuple(read_record(OnnxArtifact, tower_record(folder, tower)) for tower in TowerName)


def _card(job: Job, manifest: Manifest, report: VerifyReport, *, bundle: bool) -> str:
    return job.card(
        manifest.edit,
        manifest.calibration,
        name=manifest.name,
        licence=job.plan.recipe.model.licence,
        report=report,
        verdict=manifest.verdict,
        bundle=bundle,
    )


def _parts(job: Job, manifest: Manifest) -> dict[str, Path | bytes]:
    """Path inside the bundle to its source."""
    plan, folder, layout = job.plan, job.folder, BundleLayout
    parts: dict[str, Path | bytes] = {
        layout.RECIPE: plan.recipe_text.encode(),
        layout.EVALUATION: plan.evaluation_text.encode(),
        layout.TOKENIZER: folder.tokenizer,
        layout.PATCH: folder.patch,
        layout.SCORE: folder.score_record,
        layout.EDIT: folder.edit_record,
        layout.REPORT: folder.report,
        layout.VERDICT: folder.verdict,
        layout.REFERENCE: folder.reference,
    }
    parts |= place_from(plan.evaluation_base, plan.out)
    for graph in manifest.onnx:
        for name in filter(None, (graph.file, graph.external_data)):
            parts[layout.onnx(name)] = folder.export / name
    for engine in manifest.engines:
        parts |= {path: folder.engines(engine.variant) / Path(path).name for path in engine_paths(engine)}
    auto = [made for made in _converted(job) if made.variant.precision is Precision.AUTO]
    if any((made.folder / folder.precision_plan.name).is_file() for made in auto):
        parts[layout.PLAN] = folder.precision_plan
    if plan.head is not None:
        parts |= {f"{PLACE}/{WEIGHTS}": plan.head.weights, f"{PLACE}/{TEXTS}": plan.head.texts}
        parts[f"{PLACE}/{ITEMS}"] = plan.head.items_file
        parts[layout.RISKS] = folder.risks
    if plan.training is not None:
        parts[layout.TRAINING] = json_from_record(plan.training).encode()
    if plan.baseline is not None:
        parts[layout.BASELINE] = json_from_record(plan.baseline[0]).encode()
    for found in plan.downstream:
        parts[layout.downstream(found.kind)] = json_from_record(found).encode()
    for tower in TowerName:
        if (file := canary_file(folder.canaries, tower)).is_file():
            parts[layout.canaries(tower)] = file
            parts[layout.raw_canaries(tower)] = raw_canary_file(folder.canaries, tower)
    return parts
