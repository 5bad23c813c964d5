"""What stage `verify` does in a run."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import save_file

from uwm_deploy.bundle.head import digest_of_pair
from uwm_deploy.bundle.layout import tower_record
from uwm_deploy.data.embedding import PreparedSet, content_digests, overlap, prepare
from uwm_deploy.data.ranks import ALONE
from uwm_deploy.data.zero_shot_suite import zero_shot_digests
from uwm_deploy.edits.canary_files import read_canaries
from uwm_deploy.edits.patch import Patch
from uwm_deploy.edits.proof import ExpectedModel
from uwm_deploy.edits.replay import MadeFrom, expected_edit
from uwm_deploy.records.codec import read_record, write_record
from uwm_deploy.records.edit import EditRecord, ScoreRecord
from uwm_deploy.records.evidence import Goldens
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact
from uwm_deploy.records.model import TowerName
from uwm_deploy.safeground.health import Differences
from uwm_deploy.stages.job import Job
from uwm_deploy.stages.models import Models
from uwm_deploy.stages.verify.anew import tracer
from uwm_deploy.stages.verify.assembly import Verified, verify
from uwm_deploy.stages.verify.calibration import differences_of
from uwm_deploy.stages.verify.decoding import scaled_decoding
from uwm_deploy.stages.verify.executed import RiskReference
from uwm_deploy.stages.verify.goldens import goldens_of
from uwm_deploy.stages.verify.subjects import Artifacts
from uwm_deploy.stages.verify.verify import EMBED_BATCH, embed_model, risks_of_model
from uwm_deploy.towers.library import library_of
from uwm_deploy.towers.protocol import LoadedModel


def make(job: Job, out: Path) -> None:
    """Measures original, edited and every artifact on the evaluation set."""
    models, progress, ranks = job.shared(Models), job.notes.progress, job.ranks
    prepared = prepare(
        job.plan.evaluation_source,
        models.original.ref.image,
        models.tokenizer,
        workers=job.plan.workers,
        progress=progress,
        batch=EMBED_BATCH,
        ranks=ALONE if ranks.first else ranks,  # the first runs every artifact on all of it
    )
    original = embed_model(models.original, prepared, "evaluation, original", progress, ranks)
    differences = _differences(job, models) if ranks.first else {}
    expected = _expected(job, models)
    ref = models.original.ref
    models.forget_original()  # one model in memory at a time
    edited = embed_model(models.edited, prepared, "evaluation, edited", progress, ranks)
    if not ranks.first:
        return
    source, canaries = (
        job.plan.evaluation_source,
        {name: read_canaries(job.folder.canaries, name) for name in TowerName},
    )
    verified = Verified(
        artifacts=artifacts_of(job),
        original=ref,
        edited=models.edited,
        embedded=(original, edited),
        prepared=prepared,
        canaries={name: part for name, part in canaries.items() if part is not None},
        expected=expected,
        goldens=_goldens(job, models.edited),
        evaluation=source.record,
        zero_shot_digests=zero_shot_digests(source),
        calibrated=job.plan.calibration_source.record.concepts,
        differences=differences,
        calibration_overlap=_overlap(job),
        risk=_risk(job, models.edited, prepared, out),
        head_digest=job.plan.head_digest,
        head_overlap=_head_overlap(job, prepared),
        scaled=scaled_decoding(
            source, models.edited, edited, workers=job.plan.workers, batch=EMBED_BATCH, progress=progress
        ),
    )
    write_record(out / job.folder.report.name, verify(verified, progress))
    save_file(original.to_tensors("original") | edited.to_tensors("edited"), out / job.folder.reference.name)


def artifacts_of(job: Job) -> Artifacts:
    """The graphs and engines that the stages before left."""
    exported = _graphs(job.folder.export)
    converted = [graph for made in job.inputs.get("convert", ()) for graph in _graphs(made.folder).values()]
    engines = {
        made.variant.name: {
            tower: (engine, made.folder / engine.file)
            for tower in TowerName
            for engine in (read_record(EngineArtifact, tower_record(made.folder, tower)),)
        }
        for made in job.inputs["compile"]
    }
    return Artifacts(
        exported=exported,
        engines=engines,
        compiled_from={graph.digest: file for graph, file in [*exported.values(), *converted]},
        edit=read_record(EditRecord, job.folder.edit_record),
        patch=Patch.from_file(job.folder.patch),
        export=job.plan.recipe.export,
        profile=job.plan.recipe.compile.profile,
        converted={graph.digest: graph for graph, _ in converted},
        trace=job.shared(tracer),
    )


def _graphs(folder: Path) -> dict[TowerName, tuple[OnnxArtifact, Path]]:
    records = {tower: read_record(OnnxArtifact, tower_record(folder, tower)) for tower in TowerName}
    return {tower: (record, folder / record.file) for tower, record in records.items()}


def _expected(job: Job, models: Models) -> ExpectedModel:
    """What the edited model must be, made again from what its steps were made from."""
    plan, folder = job.plan, job.folder
    made_from = MadeFrom(
        original=models.original,
        score=read_record(ScoreRecord, folder.score_record),
        scores=folder.scores,
        fit=folder.fit,
        before=lambda: models.before_closed_form(job.ranks)[0],
        trained=models.load_trained if plan.trained else None,
        training=plan.training,
    )
    edit = read_record(EditRecord, folder.edit_record)
    return expected_edit(plan.recipe, made_from, edit, Patch.from_file(folder.patch))


def _differences(job: Job, models: Models) -> dict[TowerName, Differences]:
    """What is unsafe about the calibration set, by the original model."""
    return differences_of(
        models.original,
        job.plan.calibration_source,
        models.tokenizer,
        workers=job.plan.workers,
        progress=job.notes.progress,
    )


def _risk(job: Job, edited: LoadedModel, prepared: PreparedSet, out: Path) -> RiskReference | None:
    """What the safety head says on the edited model; None without a head."""
    if job.plan.head is None:
        return None
    risk = RiskReference(job.plan.head.record, risks_of_model(edited, prepared, job.notes.progress))
    save_file(risk.found.to_tensors(), out / job.folder.risks.name)
    return risk


def _goldens(job: Job, edited: LoadedModel) -> Goldens:
    """The runtime and the towers against the source library."""
    family, text = job.plan.recipe.model.family, edited.ref.text
    return goldens_of(edited, library_of(family, edited.source, job.folder.edited_model, text))


def _head_overlap(job: Job, prepared: PreparedSet) -> int:
    """Evaluation items whose images the safety head was trained or calibrated on."""
    if (head := job.plan.head) is None:
        return 0
    rows = range(len(prepared.ids))
    pairs = ((prepared.safe_pixels[i : i + 1][0], prepared.unsafe_pixels[i : i + 1][0]) for i in rows)
    return sum(digest_of_pair(*pair) in head.items for pair in pairs)


def _overlap(job: Job) -> int:
    """Evaluation items whose content is also in the calibration set."""
    sets = [
        content_digests(source, workers=job.plan.workers, progress=job.notes.progress)
        for source in (job.plan.calibration_source, job.plan.evaluation_source)
    ]
    if same := len(sets[1]) - len(set(sets[1])):
        job.notes.line(
            f"note: {same} of {len(sets[1])} quadruples of {job.plan.evaluation.name} have the content of another one: they "
            "are counted twice, so intervals are narrower than they should be"
        )
    return overlap(*sets)
