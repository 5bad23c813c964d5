"""Stage `canaries`: inputs of the calibration set where the edited and the original model differ most."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from uwm_deploy.data.source import PairBatch
from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.model import TowerName
from uwm_deploy.safeground.canaries import Canaries, choose
from uwm_deploy.towers.protocol import Tower

PAIRS = 64
"""Pairs of the calibration set that canaries are chosen from."""


def canary_file(folder: Path, tower: TowerName) -> Path:
    """Where the canaries of a tower are; there is none when the tower is not edited."""
    return folder / f"{tower.value}.safetensors"


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


def read_canaries(folder: Path, tower: TowerName) -> Canaries | None:
    """Canaries of a tower; None when it is not edited.

    Raises:
        IntegrityError: If the file cannot be read.
    """
    path = canary_file(folder, tower)
    if not path.is_file():
        return None
    try:
        return Canaries(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise IntegrityError(f"{path.name} cannot be read: {error}", fix="remove the run folder") from error


@torch.inference_mode()
def _embed(tower: Tower, inputs: np.ndarray) -> np.ndarray:
    device = next(tower.graph_module().parameters()).device
    parts = [
        tower.embed(torch.from_numpy(rows).to(device)).float().cpu().numpy()
        for rows in np.split(inputs, range(16, len(inputs), 16))
    ]
    return np.concatenate(parts)
