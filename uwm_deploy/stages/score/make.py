"""What stage `score` does in a run."""

from __future__ import annotations

from pathlib import Path

from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.edits.methods import needs_gradients, selects
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.edits.pairs import repaired, scoring_order
from uwm_deploy.edits.sharded_sums import Scale
from uwm_deploy.records.model import TowerName
from uwm_deploy.stages.job import Job
from uwm_deploy.stages.models import Models
from uwm_deploy.stages.score.nearest import nearest_partners
from uwm_deploy.stages.score.score import score_to_folder

_NEAREST_PAIRS = 64
"""Caption pairs per forward pass while nearest safe captions are looked for."""


def make(job: Job, out: Path) -> None:
    """Scores every edited layer on the calibration set."""
    plan, models, edits = job.plan, job.shared(Models), job.plan.recipe.entries
    whole = _paired(job, models)
    source = scoring_order(whole, edits, plan.calibration.seed)
    batch_pairs = models.batch_pairs(job.ranks)
    sort_by_length = not (edits.per_concept or needs_gradients(edits.method))

    def pairs(tower: TowerName) -> PairStream:
        workers = plan.workers if tower is TowerName.IMAGE else 0
        return models.pairs(
            source, tower, batch_pairs=batch_pairs[tower], workers=workers, sort_by_length=sort_by_length
        )

    if selects(edits.method):
        for tower in edits.towers:
            pairs(tower)  # a set without pairs for one of them is refused before anything is scored
    concepts = dict(zip(whole.ids, whole.concepts, strict=True)) if edits.per_concept else None
    scale = Scale(
        ranks=job.ranks,
        dtype=plan.score_dtype,
        part=plan.batch_pairs,
        kept=job.folder.scoring,
        key=job.key,
        notice=job.notes.line,
    )
    score_to_folder(models.original, whole.record, pairs, edits, out, concepts, scale)


def _paired(job: Job, models: Models) -> QuadrupleSource:
    """The calibration set with the pairs that its definition asks for."""
    source = job.plan.calibration_source
    if job.plan.calibration.pairing == "own" or not selects(job.plan.recipe.entries.method):
        return source
    pairs = models.pairs(source, TowerName.TEXT, batch_pairs=_NEAREST_PAIRS)
    return repaired(source, nearest_partners(models.original.text, pairs))
