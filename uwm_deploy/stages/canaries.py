"""Stage `canaries`: inputs of the calibration set where the edited and the original model differ most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from uwm_deploy.data.encoded import bytes_of
from uwm_deploy.data.order import some_of
from uwm_deploy.data.source import PairBatch, Quadruple, QuadrupleSource
from uwm_deploy.edits.canary_files import canary_file, raw_canary_file
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.raw_canaries import RAW, RawCanaries
from uwm_deploy.safeground.canaries import choose
from uwm_deploy.stages.job import Job
from uwm_deploy.stages.models import Models
from uwm_deploy.towers.batch_size import USUAL_PAIRS
from uwm_deploy.towers.protocol import Tower

PAIRS = 64
"""Pairs of the calibration set that canaries are chosen from."""


def canaries_to_folder(
    original: Tower, edited: Tower, pairs: Iterable[PairBatch], folder: Path
) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Chooses and saves the canaries of one tower.

    Args:
        original: The unedited tower.
        edited: The edited one.
        pairs: Inputs to choose from, at full length.
        folder: Where the file goes.

    Returns:
        Id and side of the item of each canary, and the canaries' embeddings by the edited tower, (k, d) float32.
    """
    parts = [(batch.ids, side, getattr(batch, side)) for batch in pairs for side in ("safe", "unsafe")]
    inputs, items = np.concatenate([rows for *_, rows in parts]), [(i, side) for ids, side, _ in parts for i in ids]
    before, after = _embed(original, inputs), _embed(edited, inputs)
    rows = choose(before, after)
    if len(rows):  # else the models are the same, which the gate says better
        chosen = {"inputs": inputs[rows], "original": before[rows], "edited": after[rows]}
        save_file(chosen, canary_file(folder, original.name))
    return [items[row] for row in rows], after[rows]


def raw_canaries_to_folder(
    tower: TowerName, source: QuadrupleSource, items: Sequence[tuple[str, str]], edited: np.ndarray, folder: Path
) -> None:
    """Saves some canaries of a tower as users send them.

    Args:
        tower: Which.
        source: The set that they come from.
        items: Id and side of the item of each canary.
        edited: (k, d) float32, their embeddings by the edited tower.
        folder: Where the file goes.
    """
    places = {name: place for place, name in enumerate(source.ids)}
    found = [_sent(tower, source.read(places[name]), side) for name, side in items]
    # What is written between such brackets is letters to a server, and a special token to the model.
    kept = [i for i, data in enumerate(found) if tower is TowerName.IMAGE or b"<" not in data][:RAW]
    raw = RawCanaries(tuple(found[i] for i in kept), edited[kept])
    save_file(raw.tensors(), raw_canary_file(folder, tower))


def _sent(tower: TowerName, item: Quadruple, side: str) -> bytes:
    """One member of an item, encoded without loss."""
    member = getattr(item, f"{side}_{tower.value}")
    return member.encode() if tower is TowerName.TEXT else bytes_of(member)


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
        chosen, edited = canaries_to_folder(models.original.tower(tower), models.edited.tower(tower), pairs, out)
        raw_canaries_to_folder(tower, source, chosen, edited, out)
