"""What stage `gate` does in a run."""

from __future__ import annotations

from pathlib import Path

from uwm_deploy.records.codec import read_record, write_record
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.stages.gate.gate import gate
from uwm_deploy.stages.job import Job


def make(job: Job, out: Path) -> None:
    """Judges the report by the policy and, where there is one, against the accepted report."""
    plan, file = job.plan, job.folder.report
    baseline, digest = plan.baseline or (None, "")
    verdict = gate(
        read_record(VerifyReport, file),
        plan.policy,
        policy_digest=plan.policy_digest,
        report_digest=digest_of_file(file),
        baseline=baseline,
        baseline_digest=digest,
    )
    write_record(out / job.folder.verdict.name, verdict)
