"""Gathers what a report page shows from the JSON files of a bundle or of a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from uwm_deploy.bundle.downstream import downstream_in, read_downstream
from uwm_deploy.bundle.layout import BundleLayout, RunFolder, tower_record
from uwm_deploy.bundle.open import is_bundle, open_bundle
from uwm_deploy.bundle.tensors import arrays_from
from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.records.bundle import BundleFile
from uwm_deploy.records.codec import read_record, record_from_json
from uwm_deploy.records.downstream import KINDS, DownstreamReport
from uwm_deploy.records.edit import EditRecord, ScoreRecord
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, PrecisionPlan
from uwm_deploy.records.head import SafetyHead
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.studies import BenchReport, MethodComparison, SweepReport
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.safeground.embedded import EmbeddedSet
from uwm_deploy.safeground.preference import Decisions

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """Decisions of the original and of the edited model on the same quadruples.

    Attributes:
        ids: n item ids.
    """

    ids: tuple[str, ...]
    original: Decisions
    edited: Decisions


@dataclass(frozen=True, slots=True, kw_only=True)
class Dossier:
    """Everything a page is made of.

    Attributes:
        kind: ``"bundle"`` or ``"run folder"``.
        created: When the bundle was made; empty for a run folder.
        verdict: None when nothing was judged yet.
        margins: None when the reference embeddings are not there.
        files: The evidence, with digests.
        head: The safety head; None without one, and of a run folder, which does not hold it.
        sweep: When one was given.
        bench: When one was given.
        compared: When a comparison of methods was given.
        downstream: Captions and pictures behind the edited towers, where they were given or the bundle holds them.
    """

    name: str
    kind: str
    created: str
    verify: VerifyReport
    verdict: Verdict | None
    edit: EditRecord
    score: ScoreRecord
    plan: PrecisionPlan | None
    onnx: tuple[OnnxArtifact, ...]
    converted: tuple[OnnxArtifact, ...]
    engines: tuple[EngineArtifact, ...]
    files: tuple[BundleFile, ...]
    margins: Margins | None
    head: SafetyHead | None = None
    sweep: SweepReport | None = None
    bench: BenchReport | None = None
    compared: MethodComparison | None = None
    downstream: tuple[DownstreamReport, ...] = ()


def dossier_of(
    path: Path,
    sweep: Path | None = None,
    bench: Path | None = None,
    compared: Path | None = None,
    downstream: Sequence[Path] = (),
) -> Dossier:
    """What a bundle or a run folder says.

    Args:
        path: Folder of either kind.
        sweep: A `sweep.json` of the same model.
        bench: What `bench --json` said of the same edit.
        compared: A `compare.json` of the same model.
        downstream: A `caption.json` and a `draw.json` of the same edit, instead of those that the bundle holds.

    Raises:
        InputError: If the folder is neither, or was not verified yet, or one of the others is of other weights.
        IntegrityError: If a digest or a record is not what it should be.
    """
    dossier = _of_bundle(path) if is_bundle(path) else _of_run(path)
    if sweep is not None:
        swept = read_record(SweepReport, sweep)
        if swept.model.weights_digest != dossier.verify.model.weights_digest:
            raise InputError(f"{sweep} is a sweep of other weights", fix="sweep the model of this report")
        dossier = dataclasses.replace(dossier, sweep=swept)
    if bench is not None:
        measured = read_record(BenchReport, bench)
        if measured.edited_weights_digest != dossier.verify.edited_weights_digest:
            raise InputError(f"{bench} is about other weights", fix="measure the bundle of this report")
        dossier = dataclasses.replace(dossier, bench=measured)
    if compared is not None:
        methods = read_record(MethodComparison, compared)
        if methods.model.weights_digest != dossier.verify.model.weights_digest:
            raise InputError(f"{compared} compares methods on other weights", fix="compare on the model of this report")
        dossier = dataclasses.replace(dossier, compared=methods)
    own = {found.kind: found for found in dossier.downstream}
    given = read_downstream(downstream)
    given.check_of(dossier.verify)
    own |= {found.kind: found for found in given.reports}
    return dataclasses.replace(dossier, downstream=tuple(own[kind] for kind in KINDS if kind in own))


def _of_bundle(path: Path) -> Dossier:
    bundle = open_bundle(path, allow_failed=True)
    manifest = bundle.manifest
    listed = {file.path for file in manifest.files}

    def record(cls: type[R], name: str) -> R:
        return record_from_json(cls, bundle.read(name), where=name)

    reference, verify = BundleLayout.REFERENCE, record(VerifyReport, BundleLayout.REPORT)
    return Dossier(
        name=manifest.name,
        kind="bundle",
        created=f"{manifest.created} by uwm-deploy {manifest.tool_version}",
        verify=verify,
        verdict=manifest.verdict,
        edit=manifest.edit,
        score=record(ScoreRecord, BundleLayout.SCORE),
        plan=record(PrecisionPlan, BundleLayout.PLAN) if BundleLayout.PLAN in listed else None,
        onnx=manifest.onnx,
        converted=manifest.converted,
        engines=manifest.engines,
        files=manifest.files,
        margins=_margins(bundle.read(reference), reference) if reference in listed else None,
        head=manifest.head,
        downstream=downstream_in(bundle, verify),
    )


def _of_run(path: Path) -> Dossier:
    run = RunFolder(path)
    report = run.report
    if not report.is_file():
        raise InputError(
            f"{path} is neither a bundle nor a run folder that was verified", fix="pass what `build` or `verify` wrote"
        )
    verify, digest = read_record(VerifyReport, report), digest_of_file(report)
    judged = run.verdict
    verdict = read_record(Verdict, judged) if judged.is_file() else None
    if verdict is not None and verdict.report_digest != digest:
        verdict, judged = None, report  # the verdict of an earlier report says nothing about this one
    engines, folders = _engines(run, verify)
    converted = [
        read_record(OnnxArtifact, file)
        for name in dict.fromkeys(engine.variant.rpartition("-")[2] for engine in engines)
        for tower in TowerName
        if (file := tower_record(run.stage("convert", name), tower)).is_file()
    ]
    plan, reference = run.precision_plan, run.reference
    files = [run.score_record, run.edit_record, run.patch]
    files += [*sorted(run.export.glob("*.onnx*")), *(f for folder in folders for f in folder)]
    files += [report, reference, *([judged] if verdict else [])]
    return Dossier(
        name=path.resolve().name,
        kind="run folder",
        created="",
        verify=verify,
        verdict=verdict,
        edit=read_record(EditRecord, run.edit_record),
        score=read_record(ScoreRecord, run.score_record),
        plan=read_record(PrecisionPlan, plan) if plan.is_file() and any("auto" in e.variant for e in engines) else None,
        onnx=tuple(read_record(OnnxArtifact, tower_record(run.export, tower)) for tower in TowerName),
        converted=tuple(converted),
        engines=tuple(engines),
        files=tuple(_listed(path, file) for file in dict.fromkeys(files) if file.is_file()),
        margins=_margins(reference.read_bytes(), str(reference)) if reference.is_file() else None,
    )


def _engines(run: RunFolder, verify: VerifyReport) -> tuple[list[EngineArtifact], list[list[Path]]]:
    """Engines that the report is about, and their files; a run folder may hold older ones too."""
    engines, files = [], []
    for artifact in verify.artifacts:
        for tower, digest in artifact.artifact_digests.items():
            record = tower_record(run.engines(artifact.variant), TowerName(tower))
            if not record.is_file():
                continue
            engine = read_record(EngineArtifact, record)
            if engine.digest == digest:
                engines.append(engine)
                files.append([record.parent / name for name in (engine.file, engine.external_data) if name])
    return engines, files


def _listed(path: Path, file: Path) -> BundleFile:
    return BundleFile(
        path=file.relative_to(path).as_posix(), size_bytes=file.stat().st_size, digest=digest_of_file(file)
    )


def _margins(content: bytes, where: str) -> Margins:
    tensors = arrays_from(content, where)
    original, edited = (EmbeddedSet.from_tensors(tensors, name) for name in ("original", "edited"))
    if original.ids != edited.ids:
        raise IntegrityError(f"{where}: original and edited are of different items", fix="build again")
    return Margins(ids=edited.ids, original=original.decisions(), edited=edited.decisions())
