"""Files of a fit, read back: its record, its sums, and the features that are kept for the choice of a strength."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from uwm_deploy.edits.moments import Moments
from uwm_deploy.errors import InputError, IntegrityError, unreadable
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.edit import FitRecord
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.records.tensor_file import all_tensors, open_tensors


def read_fit(folder: Path) -> FitRecord:
    """Record of a fit.

    Raises:
        InputError: If the folder holds none.
    """
    file = folder / RECORD
    if not file.is_file():
        raise InputError(f"{folder.parent} holds no fit", fix="pass --work with the bundle's run folder")
    return record_from_json(FitRecord, file.read_bytes(), where=RECORD)


def read_sums(folder: Path, fit: FitRecord) -> dict[TowerName, Moments]:
    """Sums per tower.

    Raises:
        IntegrityError: If the file is not the one that its record describes.
    """
    tensors = _read(folder / SUMS, fit.sums_digest)
    return {name: Moments.from_tensors(tensors, name.value) for name in TowerName}


def read_features(folder: Path, fit: FitRecord) -> dict[str, np.ndarray]:
    """Features that a fit kept, see `fit_to_folder`.

    Returns:
        Arrays by name: ``<tower>.safe``, ``<tower>.unsafe`` and ``zero_shot.<set>.images`` and ``.classes``, (n, m) float32;
        the same with ``original_`` before the last part, (n, d) float32, rows of length 1; ``zero_shot.<set>.labels``, (n,)
        int64; ``names``, (bytes,) uint8, JSON of ids and concepts.

    Raises:
        IntegrityError: If the file is not the one that its record describes.
    """
    return _read(folder / FEATURES, fit.features_digest)


def _read(path: Path, digest: Digest) -> dict[str, np.ndarray]:
    said, fix = "is not the file its record describes", "remove the run folder"
    try:
        same = digest_of_file(path) == digest
    except OSError as error:
        raise unreadable(path.name, error, fix=fix, kind=IntegrityError) from error
    if not same:
        raise IntegrityError(f"{path.name} {said}", fix=fix)
    with open_tensors(path, framework="numpy", said=said, fix=fix, kind=IntegrityError) as file:
        return all_tensors(file)


SUMS, FEATURES, RECORD = "fit.safetensors", "features.safetensors", "fit.json"
