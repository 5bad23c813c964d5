"""The report of a verification, assembled in one place: a build, a refit and the self-test all come through here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.evidence import ArtifactEvidence, DataHealth, EditProof, Goldens, ScaledDecoding, VerifyReport
from uwm_deploy.records.metrics import RiskReport
from uwm_deploy.records.model import Digest, ModelRef
from uwm_deploy.safeground.embedded import (
    EmbeddedSet,
    flips_between,
    hard_safe_worst,
    safety_report,
    worst_items,
    yardstick_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a model beside what it makes of the evaluation set.

    Attributes:
        model: The source model.
        edited_weights_digest: Of the edited model.
        evaluation: The set.
        calibration_overlap: Items in both sets.
        zero_shot_digests: Of the zero-shot sets, by name.
        edit_proof: The saved model against the source and every step of the edit.
        goldens: Runtime and towers against the source library.
        data: Signs of a fault in the set.
        versions: Of the libraries.
        head_digest: Of the safety head; empty without one.
        risk: What the head says on the edited model.
        head_overlap: Evaluation items that the head was trained on.
        scaled: Decoding at a reduced size; None where it was not asked.
    """

    model: ModelRef
    edited_weights_digest: Digest
    evaluation: CalibrationRecord
    calibration_overlap: int
    zero_shot_digests: Mapping[str, Digest]
    edit_proof: EditProof | None
    goldens: Goldens | None
    data: DataHealth | None
    versions: Mapping[str, str]
    head_digest: Digest
    risk: RiskReport | None
    head_overlap: int
    scaled: ScaledDecoding | None = None


def report_of(
    known: Known, original: EmbeddedSet, edited: EmbeddedSet, artifacts: tuple[ArtifactEvidence, ...]
) -> VerifyReport:
    """The report on a build.

    Args:
        known: What is known of the model.
        original: The evaluation set, embedded by the source model.
        edited: By the edited model, both in PyTorch float32.
        artifacts: What was measured of every artifact, those that were not executed included.
    """
    yardstick = yardstick_of(original)
    return VerifyReport(
        **fields_of(known),
        original=safety_report("original", original, with_items=True, yardstick=yardstick),
        edited=safety_report("edited", edited, with_items=True, yardstick=yardstick),
        edit_effect=flips_between(original, edited, yardstick),
        edit_worst=worst_items("edited", original, edited),
        hard_safe=yardstick.hard_ids(),
        hard_safe_worst=hard_safe_worst(yardstick, edited),
        artifacts=artifacts,
    )


def fields_of(known: Known) -> dict[str, Any]:
    """The fields by name."""
    return {name: getattr(known, name) for name in known.__dataclass_fields__}


def known_of(report: VerifyReport) -> Known:
    """What an earlier report says of the model, for another edit of it, whose decisions were not measured."""
    return Known(**{name: getattr(report, name) for name in Known.__dataclass_fields__} | {"scaled": None})
