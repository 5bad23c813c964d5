"""Whether a report is about what lies beside it: the same set, edit and engines, and the numbers that its evidence gives."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from uwm_deploy.errors import DataError
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.model import Digest, ModelRef
from uwm_deploy.records.verdict import Check, statement
from uwm_deploy.safeground.embedded import EmbeddedSet
from uwm_deploy.stages.gate.recomputed import departures_from

REPORT = "report"
"""Subject of the checks."""

SET, EDIT, MODEL, ARTIFACTS, AGAIN = (
    "the report is about this evaluation set", "the report is about this edit", "the report is about this model",
    "the report is about these artifacts", "SafeGround computed again",
)  # fmt: skip
"""Names of the checks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a report lies beside.

    Attributes:
        model: The model that was edited.
        edited_weights_digest: Of the edited model.
        artifacts: Digests of graphs and engines, by variant and tower.
        embedded: The evaluation set, embedded by the original and by the edited model.
        evaluation: The evaluation set; None where only its embeddings are there.
        executed: What executing the artifacts where they are judged showed; empty where they were not.
    """

    model: ModelRef
    edited_weights_digest: Digest
    artifacts: Mapping[str, Mapping[str, Digest]]
    embedded: tuple[EmbeddedSet, EmbeddedSet]
    evaluation: CalibrationRecord | None = None
    executed: tuple[Check, ...] = ()


def belongs(report: VerifyReport, beside: Beside | None) -> list[Check]:
    """Checks that a report belongs where it lies; none of one that lies alone.

    Args:
        report: The report.
        beside: What it lies beside.
    """
    if beside is None:
        return []
    measured = {a.variant: dict(a.artifact_digests) for a in report.artifacts}
    foreign = sorted(v for v in measured.keys() | beside.artifacts.keys() if measured.get(v) != beside.artifacts.get(v))
    weights = report.edited_weights_digest == beside.edited_weights_digest
    return [
        statement(SET, REPORT, not (words := _other_set(report, beside)), words),
        statement(MODEL, REPORT, not (part := other_part(report.model, beside.model)), f"it has another {part}"),
        statement(EDIT, REPORT, weights, "it was measured on another edited model: verify again"),
        statement(ARTIFACTS, REPORT, not foreign, f"it was measured on other files of {', '.join(foreign[:3])}"),
        _computed_again(report, beside),
        *beside.executed,
    ]


def other_part(left: ModelRef, right: ModelRef) -> str:
    """What differs of two models that must be one; names, and where the weights came from, do not count."""
    parts = {"family": "family", "weights_digest": "weights", "embed_dim": "width", "image": "image preprocessing",
             "text": "tokenisation"}  # fmt: skip
    return next((words for name, words in parts.items() if getattr(left, name) != getattr(right, name)), "")


def _other_set(report: VerifyReport, beside: Beside) -> str:
    if beside.evaluation is not None and beside.evaluation != report.evaluation:
        return f"it was measured on another set than {beside.evaluation.name}: verify again"
    for part in beside.embedded:
        ids = f"sha256:{hashlib.sha256(chr(10).join(part.ids).encode()).hexdigest()}"
        if ids != report.evaluation.ids_digest or dict(Counter(part.concepts)) != dict(report.evaluation.concepts):
            return "the embeddings beside it are of other items: verify again"
    return ""


def _computed_again(report: VerifyReport, beside: Beside) -> Check:
    try:
        apart = list(departures_from(report, *beside.embedded))
    except (DataError, ValueError) as error:
        return statement(AGAIN, REPORT, False, f"the embeddings beside the report cannot be measured: {error}")
    return statement(AGAIN, REPORT, not apart, "; ".join(apart[:3]))
