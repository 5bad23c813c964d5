"""Canaries of a run folder, one file a tower."""

from __future__ import annotations

from pathlib import Path

from uwm_deploy.bundle.tensors import arrays_of
from uwm_deploy.records.model import TowerName
from uwm_deploy.safeground.canaries import Canaries


def canary_file(folder: Path, tower: TowerName) -> Path:
    """Where the canaries of a tower are; there is none when the tower is not edited."""
    return folder / f"{tower.value}.safetensors"


def raw_canary_file(folder: Path, tower: TowerName) -> Path:
    """Where some canaries of a tower are as users send them."""
    return folder / f"{tower.value}-raw.safetensors"


def read_canaries(folder: Path, tower: TowerName) -> Canaries | None:
    """Canaries of a tower; None when it is not edited.

    Raises:
        IntegrityError: If the file cannot be read.
    """
    path = canary_file(folder, tower)
    if not path.is_file():
        return None
    return Canaries.from_tensors(arrays_of(path, fix="remove the run folder"), path.name)
