"""Whose numbers a report holds: the original model, the edited model and every artifact that was executed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, VerifyReport
from uwm_deploy.records.metrics import SafetyReport

Kind = Literal["original", "edited", "engine"]


def executed_artifacts(report: VerifyReport) -> list[tuple[ArtifactEvidence, SafetyReport]]:
    """Artifacts that were executed, with their numbers."""
    return [(a, a.safety) for a in report.artifacts if a.evidence is Evidence.EXECUTED and a.safety is not None]


def measured_subjects(report: VerifyReport) -> Iterator[tuple[str, Kind, SafetyReport]]:
    """Label, kind and numbers of the original model, the edited one and what was executed, in that order."""
    yield "original", "original", report.original
    yield "edited", "edited", report.edited
    for artifact, safety in executed_artifacts(report):
        yield artifact.variant, "engine", safety
