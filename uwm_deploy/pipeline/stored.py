"""What a bundle's own evidence says its artifacts must do: `attest` and the check of a server measure against it.

Needs no torch: the reference is the edited model's embeddings that the build stored in the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.bundle.tensors import arrays_from
from uwm_deploy.data.embedding import Inputs, PreparedSet, unit_rows
from uwm_deploy.data.reading import Progress
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, GraphAudit, OutputParity, VerifyReport
from uwm_deploy.records.graph import EXPORTED, Precision, Profile
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.runtime.selftest import stored_canaries
from uwm_deploy.runtime.session import Session
from uwm_deploy.safeground.canaries import Canaries
from uwm_deploy.safeground.embedded import EmbeddedSet, Yardstick, parity, yardstick_of
from uwm_deploy.safeground.risk import RiskSet
from uwm_deploy.stages.verify.captions import WholeRows
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
        normalised: Whether the embeddings have length 1 already.
        audit: What is known of the files, from when they were made.
        where: What executes it.
        further: Parity of the outputs behind the embedding.
        whole: The exported text graph on whole rows, where the artifact cuts them; None where it does not.
    """

    variant: str
    precision: Precision
    profile: Profile
    sessions: Mapping[TowerName, Session]
    outputs: Mapping[TowerName, str]
    digests: Mapping[TowerName, Digest]
    where: Mapping[str, str]
    normalised: bool
    audit: Mapping[str, GraphAudit]
    further: Callable[[], Iterable[OutputParity]] = tuple
    whole: WholeRows | None = None


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


def known_of_files(bundle: Bundle, variant: str) -> Mapping[str, GraphAudit]:
    """What the bundle's report says of the files of a variant, by tower: of the very bytes that are executed.

    Files were read and made again when they were made; that takes the edited model, which a bundle does not have.

    Raises:
        IntegrityError: If the report cannot be read.
    """
    report = record_from_json(VerifyReport, bundle.read(BundleLayout.REPORT), where=BundleLayout.REPORT)
    held = {engine.tower.value: engine.digest for engine in bundle.manifest.engines if engine.variant == variant}
    if variant == EXPORTED:
        held = {graph.tower.value: graph.digest for graph in bundle.manifest.onnx}
    found = next((artifact for artifact in report.artifacts if artifact.variant == variant), None)
    return found.audit if found is not None and dict(found.artifact_digests) == held else {}


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
        audit=dict(running.audit),
    )
    return executed_evidence(
        evidence,
        running.sessions,
        stored.edited,
        prepared,
        stored.canaries,
        parities,
        sizes=(running.profile.opt, running.profile.max),
        normalised=running.normalised,
        progress=progress,
        risk=stored.risk,
        yardstick=stored.yardstick,
        whole=running.whole,
    )


def reference_of(bundle: Bundle, whose: Literal["original", "edited"] = "edited") -> EmbeddedSet:
    """Embeddings of the evaluation set by the source model in PyTorch, edited or not.

    Raises:
        IntegrityError: If they cannot be read.
    """
    tensors = arrays_from(bundle.read(BundleLayout.REFERENCE), BundleLayout.REFERENCE)
    return EmbeddedSet.from_tensors(tensors, whose)


def risk_reference_of(bundle: Bundle) -> RiskReference | None:
    """The safety head and its outputs on the edited model; None without a head.

    Raises:
        IntegrityError: If they cannot be read.
    """
    if (head := bundle.manifest.head) is None:
        return None
    tensors = arrays_from(bundle.read(BundleLayout.RISKS), BundleLayout.RISKS)
    return RiskReference(head, RiskSet.from_tensors(tensors))


def _parity(tower: TowerName, running: Running, inputs: Inputs, wanted: np.ndarray, batch: int) -> OutputParity:
    """Embeddings against the stored reference, whose rows have length 1; so must those of a graph that normalises."""
    n = min(len(inputs), SINGLE_ROWS if batch == 1 else 2 * batch)
    session = running.sessions[tower]
    rows = np.concatenate([session.run(inputs[i : min(i + batch, n)]) for i in range(0, n, batch)])
    found = rows if running.normalised else unit_rows(rows)
    return parity(tower, running.outputs[tower], batch, wanted[:n], found)
