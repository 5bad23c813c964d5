"""Whether what runs is the edited model: the canaries of the bundle, on the served path, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.bundle.tensors import arrays_from
from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.drift import unit_mean
from uwm_deploy.safeground.canaries import Canaries


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Outcome of one self-test.

    Attributes:
        ratios: Per edited tower, the worst canary's distance to the edited model over that to the original one.
        limit: Largest ratio that is fine.
        error: Why it could not be carried out; empty if it was.
        seconds: How long it took.
    """

    ratios: Mapping[str, float]
    limit: float
    error: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every tower that is edited answers like the edited model."""
        return not self.error and bool(self.ratios) and all(ratio <= self.limit for ratio in self.ratios.values())


def canaries_of(bundle: Bundle) -> dict[TowerName, Canaries]:
    """Canaries of each edited tower.

    Raises:
        IntegrityError: If an edited tower has none, or they cannot be read.
    """
    found = stored_canaries(bundle)
    edited = {tower for tower in TowerName if any(tensor.changed for tensor in bundle.manifest.edit.of(tower))}
    if missing := sorted(edited - set(found)):
        raise IntegrityError(f"the bundle has no canaries of its {missing[0].value} tower", fix="build it again")
    return found


def stored_canaries(bundle: Bundle) -> dict[TowerName, Canaries]:
    """Canaries that a bundle holds, per tower; whether an edited tower lacks them is for the caller to judge.

    Raises:
        IntegrityError: If they cannot be read.
    """
    listed = {file.path for file in bundle.manifest.files}
    names = {tower: BundleLayout.canaries(tower) for tower in TowerName}
    return {tower: _canaries(bundle.read(name), name) for tower, name in names.items() if name in listed}


def reference_mean(bundle: Bundle, tower: TowerName) -> np.ndarray | None:
    """Mean of the edited model's embeddings of the evaluation set, (d,) float64; None where the bundle has no embeddings."""
    name = BundleLayout.REFERENCE
    if name not in {file.path for file in bundle.manifest.files}:
        return None
    tensors = arrays_from(bundle.read(name), name)
    rows = [tensors[key] for key in (f"edited.safe_{tower.value}", f"edited.unsafe_{tower.value}") if key in tensors]
    return unit_mean(np.concatenate(rows)) if rows else None


def _canaries(data: bytes, name: str) -> Canaries:
    return Canaries.from_tensors(arrays_from(data, name), name)
