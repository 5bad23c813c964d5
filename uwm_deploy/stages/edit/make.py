"""What stage `edit` does in a run."""

from __future__ import annotations

from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.edits.closed_form import Solve
from uwm_deploy.edits.solving import solver
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import EditRecord, FitRecord, ScoreRecord
from uwm_deploy.stages.edit.edit import MODEL, edit_to_folder
from uwm_deploy.stages.edit.trained import trained_to_folder
from uwm_deploy.stages.job import Job
from uwm_deploy.stages.models import Models


def make(job: Job, out: Path) -> None:
    """Writes the patch, its record, and the edited model with its card."""
    plan, models = job.plan, job.shared(Models)
    score, entries = read_record(ScoreRecord, job.folder.score_record), plan.recipe.entries
    original, solve = models.original, _solve(job)
    if plan.trained:
        edit = trained_to_folder(original, models.load_trained(), score, entries, plan.training, out, solve)
    else:
        edit = edit_to_folder(original, score, job.folder.scores, entries, out, solve)
        models.forget_original()  # it was edited in place
    (out / MODEL / BundleLayout.CARD).write_text(_card(job, edit, score), encoding="utf-8")


def _solve(job: Job) -> Solve | None:
    """Solves the closed-form step, if there is one."""
    spec = job.plan.recipe.closed_form
    if spec is None:
        return None
    return solver(spec, read_record(FitRecord, job.folder.fit_record), job.folder.fit, job.notes.line)


def _card(job: Job, edit: EditRecord, score: ScoreRecord) -> str:
    """The card without the numbers, which come later; the one of the bundle has them."""
    recipe = job.plan.recipe
    return job.card(edit, score.calibration, name=recipe.name, licence=recipe.model.licence)
