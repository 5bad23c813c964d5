"""What a bundle's own evidence says its artifacts must do: `attest` and the check of a server measure against it.

Needs no torch: the reference is the edited model's embeddings that the build stored in the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.data.embedding import Inputs, PreparedSet
from uwm_deploy.data.reading import Progress
from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, OutputParity
from uwm_deploy.records.graph import Precision, Profile
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.runtime.selftest import stored_canaries
from uwm_deploy.runtime.session import Session
from uwm_deploy.safeground.canaries import Canaries
from uwm_deploy.safeground.embedded import EmbeddedSet, Yardstick, parity, yardstick_of
from uwm_deploy.safeground.risk import RiskSet
from uwm_deploy.stages.verify.executed import RiskReference, executed_evidence

SINGLE_ROWS = 8
"""Rows compared one at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a bundle holds of its edited model.

    Attributes:
        edited: Embeddings of the evaluation set by the edited model in PyTorch.
        yardstick: Of the original model.
        canaries: Of each edited tower.
        risk: The safety head and its outputs on the edited model; None without a head.
    """

    edited: EmbeddedSet
    yardstick: Yardstick
    canaries: Mapping[TowerName, Canaries]
    risk: RiskReference | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An artifact at work, here or in a server.

    Attributes:
        variant: Its name in the report.
        precision: What its linear layers compute in.
        profile: Batches that it takes.
        sessions: By tower.
        outputs: Name of each tower's embedding.
        digests: Of what the sessions run, by tower.
        where: What executes it.
        further: Parity of the outputs behind the embedding.
    """

    variant: str
    precision: Precision
    profile: Profile
    sessions: Mapping[TowerName, Session]
    outputs: Mapping[TowerName, str]
    digests: Mapping[TowerName, Digest]
    where: Mapping[str, str]
    further: Callable[[], Iterable[OutputParity]] = tuple


def stored_in(bundle: Bundle) -> Stored:
    """What a bundle's own evidence holds.

    Raises:
        IntegrityError: If it cannot be read.
    """
    return Stored(
        edited=reference_of(bundle),
        yardstick=yardstick_of(reference_of(bundle, "original")),
        canaries=stored_canaries(bundle),
        risk=risk_reference_of(bundle),
    )


def measured_against(running: Running, stored: Stored, prepared: PreparedSet, progress: Progress) -> ArtifactEvidence:
    """Executes an artifact, and compares it with what is stored; see `executed_evidence`.

    Args:
        running: The artifact.
        stored: What it must do.
        prepared: The evaluation set, in the form that the sessions take.
        progress: Called as it goes on.
    """
    inputs: dict[TowerName, Inputs] = {TowerName.IMAGE: prepared.safe_pixels, TowerName.TEXT: prepared.safe_ids}
    wanted = {TowerName.IMAGE: stored.edited.safe_image, TowerName.TEXT: stored.edited.safe_text}

    def parities() -> list[OutputParity]:
        found = [
            _parity(tower, running, inputs[tower], wanted[tower], batch)
            for tower in TowerName
            for batch in sorted({1, running.profile.max})
        ]
        return [*found, *running.further()]

    evidence = ArtifactEvidence(
        variant=running.variant,
        precision=running.precision,
        evidence=Evidence.EXECUTED,
        reason="",
        where=dict(running.where),
        artifact_digests={tower.value: digest for tower, digest in running.digests.items()},
    )
    return executed_evidence(
        evidence,
        running.sessions,
        stored.edited,
        prepared,
        stored.canaries,
        parities,
        sizes=(running.profile.opt, running.profile.max),
        progress=progress,
        risk=stored.risk,
        yardstick=stored.yardstick,
    )


def reference_of(bundle: Bundle, whose: Literal["original", "edited"] = "edited") -> EmbeddedSet:
    """Embeddings of the evaluation set by the source model in PyTorch, edited or not.

    Raises:
        IntegrityError: If they cannot be read.
    """
    try:
        tensors = load(bundle.read(BundleLayout.REFERENCE))
    except SafetensorError as error:
        raise IntegrityError(f"{BundleLayout.REFERENCE} cannot be read: {error}", fix="build again") from error
    return EmbeddedSet.from_tensors(tensors, whose)


def risk_reference_of(bundle: Bundle) -> RiskReference | None:
    """The safety head and its outputs on the edited model; None without a head.

    Raises:
        IntegrityError: If they cannot be read.
    """
    if (head := bundle.manifest.head) is None:
        return None
    try:
        return RiskReference(head, RiskSet.from_tensors(load(bundle.read(BundleLayout.RISKS))))
    except SafetensorError as error:
        raise IntegrityError(f"{BundleLayout.RISKS} cannot be read: {error}", fix="build again") from error


def _parity(tower: TowerName, running: Running, inputs: Inputs, wanted: np.ndarray, batch: int) -> OutputParity:
    """Embeddings of length 1 against the stored reference."""
    n = min(len(inputs), SINGLE_ROWS if batch == 1 else 2 * batch)
    session = running.sessions[tower]
    rows = np.concatenate([session.run(inputs[i : min(i + batch, n)]) for i in range(0, n, batch)])
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return parity(tower, running.outputs[tower], batch, wanted[:n], rows / lengths)
