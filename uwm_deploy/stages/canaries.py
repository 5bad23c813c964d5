"""Stage `canaries`: inputs of the calibration set where the edited and the original model differ most."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from uwm_deploy.data.source import PairBatch
from uwm_deploy.edits.canary_files import canary_file
from uwm_deploy.edits.pairs import some_of
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.model import TowerName
from uwm_deploy.safeground.canaries import choose
from uwm_deploy.stages.job import Job
from uwm_deploy.stages.models import Models
from uwm_deploy.towers.batch_size import USUAL_PAIRS
from uwm_deploy.towers.protocol import Tower

PAIRS = 64
"""Pairs of the calibration set that canaries are chosen from."""


def canaries_to_folder(original: Tower, edited: Tower, pairs: Iterable[PairBatch], folder: Path) -> None:
    """Chooses and saves the canaries of one tower.

    Args:
        original: The unedited tower.
        edited: The edited one.
        pairs: Inputs to choose from, at full length.
        folder: Where the file goes.
    """
    inputs = np.concatenate([part for batch in pairs for part in (batch.safe, batch.unsafe)])
    before, after = _embed(original, inputs), _embed(edited, inputs)
    rows = choose(before, after)
    if not len(rows):  # the models are the same, which the gate says better
        return
    save_file(
        {"inputs": inputs[rows], "original": before[rows], "edited": after[rows]}, canary_file(folder, original.name)
    )


@torch.inference_mode()
def _embed(tower: Tower, inputs: np.ndarray) -> np.ndarray:
    device = next(tower.graph_module().parameters()).device
    parts = [
        tower.embed(torch.from_numpy(rows).to(device)).float().cpu().numpy()
        for rows in np.split(inputs, range(16, len(inputs), 16))
    ]
    return np.concatenate(parts)


def make(job: Job, out: Path) -> None:
    """Chooses the canaries of every edited tower from the calibration set."""
    models, edit = job.shared(Models), read_record(EditRecord, job.folder.edit_record)
    source = some_of(job.plan.calibration_source, PAIRS)
    for tower in [name for name in TowerName if any(tensor.changed for tensor in edit.of(name))]:
        batch = USUAL_PAIRS[TowerName.IMAGE]
        pairs = models.pairs(source, tower, batch_pairs=batch, quiet=True, sort_by_length=False)
        canaries_to_folder(models.original.tower(tower), models.edited.tower(tower), pairs, out)
