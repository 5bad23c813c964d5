"""A verification, assembled once: a build and the self-test both come through here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from uwm_deploy.data.embedding import PreparedSet
from uwm_deploy.data.reading import Progress
from uwm_deploy.edits.proof import ExpectedModel, proof_of
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.evidence import ArtifactEvidence, Goldens, ScaledDecoding, VerifyReport
from uwm_deploy.records.model import Digest, ModelRef, TowerName
from uwm_deploy.runtime.versions import BUILD_PACKAGES, RUN_PACKAGES, versions
from uwm_deploy.safeground.canaries import Canaries
from uwm_deploy.safeground.embedded import EmbeddedSet, yardstick_of
from uwm_deploy.safeground.health import Differences, data_health
from uwm_deploy.safeground.risk import risk_report
from uwm_deploy.stages.verify.executed import RiskReference
from uwm_deploy.stages.verify.report import Known, report_of
from uwm_deploy.stages.verify.subjects import Artifacts, subjects_of
from uwm_deploy.stages.verify.verify import evidence_of
from uwm_deploy.towers.protocol import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a verification is made from.

    Attributes:
        artifacts: Graphs and engines.
        original: The source model.
        edited: The edited model, read back from where it was saved.
        embedded: The evaluation set, embedded by the original and by the edited model in PyTorch.
        prepared: The evaluation set as it is fed to everything.
        canaries: Of each edited tower.
        expected: What the edited model must be.
        goldens: Runtime and towers against the source library.
        evaluation: The set.
        zero_shot_digests: Of its zero-shot sets, by name.
        calibrated: Concepts of the calibration set, with their items.
        differences: Unsafe less safe embeddings of calibration items by the original model, by tower.
        calibration_overlap: Items in both sets.
        risk: The safety head and what it says on the edited model; None without a head.
        head_digest: Of the safety head; empty without one.
        head_overlap: Evaluation items that the head was trained on.
        scaled: Decoding at a reduced size; None where it was not asked.
    """

    artifacts: Artifacts
    original: ModelRef
    edited: LoadedModel
    embedded: tuple[EmbeddedSet, EmbeddedSet]
    prepared: PreparedSet
    canaries: Mapping[TowerName, Canaries]
    expected: ExpectedModel
    goldens: Goldens
    evaluation: CalibrationRecord
    zero_shot_digests: Mapping[str, Digest]
    calibrated: Mapping[str, int]
    differences: Mapping[TowerName, Differences]
    calibration_overlap: int
    risk: RiskReference | None = None
    head_digest: Digest = ""
    head_overlap: int = 0
    scaled: ScaledDecoding | None = None


def verify(verified: Verified, progress: Progress) -> VerifyReport:
    """Executes every artifact, and writes down all that is known of the build.

    Args:
        verified: The build.
        progress: Called as it goes on.
    """
    original, edited = verified.embedded
    risk = verified.risk
    known = Known(
        model=verified.original,
        edited_weights_digest=verified.edited.ref.weights_digest,
        evaluation=verified.evaluation,
        calibration_overlap=verified.calibration_overlap,
        zero_shot_digests=verified.zero_shot_digests,
        edit_proof=proof_of(verified.expected, verified.edited.named_parameters()),
        goldens=verified.goldens,
        data=data_health(
            original,
            verified.calibrated,
            verified.differences,
            {name: part.copies for name, part in verified.prepared.repeats().items()},
        ),
        versions=versions(BUILD_PACKAGES + RUN_PACKAGES),
        head_digest=verified.head_digest,
        risk=risk_report(risk.head, risk.found) if risk else None,
        head_overlap=verified.head_overlap,
        scaled=verified.scaled,
    )
    return report_of(known, original, edited, tuple(_evidence(verified, progress)))


def _evidence(verified: Verified, progress: Progress) -> Iterator[ArtifactEvidence]:
    """What every artifact does on the evaluation set."""
    original, reference = verified.embedded
    yardstick = yardstick_of(original)
    for subject in subjects_of(verified.artifacts, verified.edited):
        yield evidence_of(
            subject,
            verified.edited,
            reference,
            verified.prepared,
            verified.canaries,
            progress,
            verified.risk,
            yardstick,
        )
        for session in (subject.sessions or {}).values():
            session.close()
