"""What stage `gate` does in a run."""

from __future__ import annotations

from pathlib import Path

from uwm_deploy.bundle.layout import tower_record
from uwm_deploy.bundle.tensors import arrays_of
from uwm_deploy.records.codec import read_record, write_record
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.graph import EXPORTED, EngineArtifact, OnnxArtifact
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.safeground.embedded import EmbeddedSet
from uwm_deploy.stages.gate.binding import Beside
from uwm_deploy.stages.gate.gate import gate
from uwm_deploy.stages.job import Job


def make(job: Job, out: Path) -> None:
    """Judges the report by the policy and, where there is one, against the accepted report."""
    plan, file = job.plan, job.folder.report
    baseline, digest = plan.baseline or (None, "")
    report = read_record(VerifyReport, file)
    if plan.given is not None:
        plan.given.check_of(report)
    verdict = gate(
        report,
        plan.policy,
        policy_digest=plan.policy_digest,
        report_digest=digest_of_file(file),
        baseline=baseline,
        baseline_digest=digest,
        beside=_beside(job),
        downstream=plan.downstream,
    )
    write_record(out / job.folder.verdict.name, verdict)


def _beside(job: Job) -> Beside:
    """What the other stages left, which the report must be about."""
    edit = read_record(EditRecord, job.folder.edit_record)
    exported = {t.value: read_record(OnnxArtifact, tower_record(job.folder.export, t)).digest for t in TowerName}
    engines: dict[str, dict[str, Digest]] = {
        made.variant.name: {
            t.value: read_record(EngineArtifact, tower_record(made.folder, t)).digest for t in TowerName
        }
        for made in job.inputs["compile"]
    }
    tensors = arrays_of(job.folder.reference, fix="verify again")
    return Beside(
        model=edit.model,
        edited_weights_digest=edit.edited_weights_digest,
        artifacts={EXPORTED: exported, **engines},
        embedded=(EmbeddedSet.from_tensors(tensors, "original"), EmbeddedSet.from_tensors(tensors, "edited")),
        evaluation=job.plan.evaluation_source.record,
    )
