"""From failing checks to the fault behind them: its kind, and the stage that made it.

One fault makes many checks fail. A graph that lost its padding mask fails in parity, in canaries and in decisions, and every
engine compiled from it fails likewise. The evidence is read in the order in which a cause can be told from its
consequences: what lies in an artifact before what it does, one row before a batch, the exported graph before the engine.
Operators that should not be there come after what only some of them do: mix rows, or draw numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from uwm_deploy.records.evidence import CONVERTED, ArtifactEvidence, VerifyReport
from uwm_deploy.records.graph import EXPORTED, Precision
from uwm_deploy.records.verdict import Blame, Cause, Check, Result
from uwm_deploy.safeground.canaries import RATIO_LIMIT
from uwm_deploy.stages.gate.anomalies import BETTER, OTHER
from uwm_deploy.stages.gate.binding import REPORT
from uwm_deploy.stages.gate.rows import LENGTH, differs_between_calls, differs_within_a_call, off_somewhere
from uwm_deploy.stages.table import NAMES

STAGE_ORDER = ("train", "load", "calibrate", *NAMES)
"""What can be at fault, in order: training, the source checkpoint, the data sets, then every stage."""

SAME, SAME_FP32 = 0.999, 0.99999
"""Cosine from which two embeddings of one input count as the same, whatever the precision, and in float32."""

HEAD_FP32 = 1e-2
"""Largest difference of a safety head's logits up to which two heads count as the same in float32."""

_OWN = {
    "the edit changes the weights": (Cause.EDIT, "edit"),
    "the edited model is the source with the edit": (Cause.EDIT, "edit"),
    "weights come from a checkpoint": (Cause.MODEL, "load"),
    "pixels as in the source library": (Cause.PREPROCESSING, "load"),
    "ids as in the source library": (Cause.TOKENISATION, "load"),
    "towers as in the source library": (Cause.GRAPH, "load"),
    "calibration items in the evaluation set": (Cause.DATA, "calibrate"),
    "items of the safety head in the evaluation set": (Cause.DATA, "train"),
    "unsafe images within the calibration set": (Cause.DATA, "calibrate"),
    "unsafe texts within the calibration set": (Cause.DATA, "calibrate"),
    "every calibrated concept is measured": (Cause.DATA, "verify"),
    BETTER: (Cause.ANOMALY, "verify"),
    OTHER: (Cause.ANOMALY, "verify"),
    "verdict of the bundle": (Cause.EVIDENCE, "gate"),
    "required evidence": (Cause.EVIDENCE, "verify"),
    "limits apply": (Cause.EVIDENCE, "gate"),
}
"""Checks that are about one thing only."""


def with_causes(checks: Sequence[Check], report: VerifyReport) -> list[Check]:
    """Checks with cause and stage, where they do not pass.

    Args:
        checks: Of a verdict.
        report: What they were made from.
    """
    artifacts = {artifact.variant: artifact for artifact in report.artifacts}
    failing = {check.subject for check in checks if check.result is Result.FAIL}
    graph = artifacts.get(EXPORTED) if EXPORTED in failing else None
    return [c if c.result is Result.PASS else _with_cause(c, artifacts.get(c.subject), graph) for c in checks]


def _with_cause(check: Check, artifact: ArtifactEvidence | None, graph: ArtifactEvidence | None) -> Check:
    if check.rule == "min_proven":
        return check  # follows from the others
    cause, stage = Cause.DECISIONS, "edit"
    if check.name in _OWN:
        cause, stage = _OWN[check.name]
    elif check.waits or check.subject == REPORT:
        cause, stage = Cause.EVIDENCE, "verify"
    elif check.subject == "data":
        cause, stage = Cause.DATA, "verify"
    elif artifact is None and _is_about_the_head(check):
        cause, stage = Cause.MODEL, "train"
    elif artifact is not None:
        artifact, graph = _of_its_tower(artifact, check), graph and _of_its_tower(graph, check)
        own = graph is None or _has_faults_of_its_own(artifact)
        cause, stage = (cause_of(artifact), _stage_of(artifact)) if own else (cause_of(graph or artifact), "export")
    return dataclasses.replace(check, cause=cause, stage=stage)


def _of_its_tower(artifact: ArtifactEvidence, check: Check) -> ArtifactEvidence:
    """What the files of one tower show, where a check is about that tower; the other one may have another fault."""
    named = {tower: audit for tower, audit in artifact.audit.items() if check.name.endswith(f" of the {tower} tower")}
    return dataclasses.replace(artifact, audit=named) if named else artifact


def _stage_of(artifact: ArtifactEvidence) -> str:
    """Where an artifact with a fault of its own was made."""
    converted = any(text.startswith(CONVERTED) for audit in artifact.audit.values() for text in audit.structure)
    return "export" if artifact.variant == EXPORTED else "convert" if converted else "compile"


def _has_faults_of_its_own(artifact: ArtifactEvidence) -> bool:
    """Whether its files show something; else an engine does what the faulty graph does that it was compiled from."""
    audits = artifact.audit.values()
    found = any((*audit.differ, *audit.lowered, *audit.structure, *audit.edit) for audit in audits)
    return artifact.variant == EXPORTED or found


def _is_about_the_head(check: Check) -> bool:
    return check.name.startswith("risk.") or "safety head" in check.name


def cause_of(artifact: ArtifactEvidence) -> Cause:
    """What is wrong with an executed artifact, of which at least one check fails."""
    audits = artifact.audit.values()
    if any(audit.edit for audit in audits):
        return Cause.EDIT
    if artifact.broken and not artifact.parity:
        return Cause.GRAPH  # embeddings of another size
    if artifact.broken or not all(part.finite for part in artifact.parity):
        return Cause.NUMBERS
    for found, cause in (
        (any(audit.differ for audit in audits), Cause.WEIGHTS),
        (any(audit.lowered for audit in audits), Cause.NUMBERS),
        (differs_between_calls(artifact), Cause.NONDETERMINISM),
        (_depends_on_the_batch(artifact), Cause.BATCHING),
        (any(audit.structure for audit in audits), Cause.GRAPH),
    ):
        if found:
            return cause
    return _cause_of_numbers(artifact)


def _cause_of_numbers(artifact: ArtifactEvidence) -> Cause:
    """What is wrong with an artifact in whose files nothing was found."""
    # Far from both models is another fault; nearer to the original one means that it is the original one.
    unedited = any(
        ratio >= 1 / RATIO_LIMIT for tower, ratio in artifact.canaries.items() if tower not in artifact.audit
    )
    if unedited:
        return Cause.EDIT
    if artifact.precision is not Precision.FP32:
        return Cause.NUMBERS  # the float32 graph it was made from has checks of its own
    off = any(part.cosine_min < SAME_FP32 or part.norm_error > 1 - SAME for part in artifact.parity)
    off = off or any(part.max_abs > HEAD_FP32 for part in artifact.risk_parity)
    off = off or off_somewhere(artifact) or any(value > LENGTH for value in artifact.lengths.values())
    return Cause.GRAPH if off else Cause.DECISIONS


def _depends_on_the_batch(artifact: ArtifactEvidence) -> bool:
    if any(part.error for part in artifact.batches) or differs_within_a_call(artifact):
        return True
    return any(part.batch > 1 and part.cosine_min < SAME for part in artifact.batches)


def blames(checks: Iterable[Check]) -> tuple[Blame, ...]:
    """The faults behind what blocks, the earliest stage first; what follows from another one is not named again."""
    found: dict[tuple[Cause, str], Blame] = {}
    for check in checks:
        if not check.blocks or check.cause is None or check.waits or check.result is Result.INCONCLUSIVE:
            continue
        key = (check.cause, check.stage)
        if key not in found:
            text = f"{check.name}: {check.detail}" if check.detail else check.name
            found[key] = Blame(cause=check.cause, stage=check.stage, subject=check.subject, detail=text)
    kept = [blame for blame in found.values() if not any(_explains(other, blame) for other in found.values())]
    return tuple(sorted(kept, key=_rank))


_FED = (Cause.PREPROCESSING, Cause.TOKENISATION, Cause.GRAPH)
"""What makes a sound set look unsound, where it is wrong in the source model already."""


def _explains(cause: Blame, effect: Blame) -> bool:
    """Whether a fault is enough to show another one: it goes on through every later stage, and changes what is measured."""
    earlier = STAGE_ORDER.index(cause.stage) < STAGE_ORDER.index(effect.stage)
    if Cause.EVIDENCE in (cause.cause, effect.cause):
        return False
    if effect.cause is Cause.ANOMALY:
        return cause.cause not in (Cause.ANOMALY, Cause.DECISIONS)  # only what nothing explains is one
    if effect.cause is Cause.DECISIONS:
        return cause.cause is not Cause.DECISIONS and (earlier or cause.stage in (effect.stage, "verify"))
    if effect.cause is Cause.DATA and cause.stage == "load" and cause.cause in _FED:
        return True
    if effect.stage == "compile" and cause.stage == "export":
        return True
    return earlier and cause.cause is effect.cause


_CLASS_ORDER = tuple(Cause)


def _rank(blame: Blame) -> tuple[int, int, int]:
    """A verdict that does not hold, or a report about something else, comes first: whatever else fails follows from it."""
    foreign = blame.subject == REPORT or (blame.cause, blame.stage) == (Cause.EVIDENCE, "gate")
    place = 0 if foreign else 2 if blame.cause is Cause.DECISIONS else 1
    return place, STAGE_ORDER.index(blame.stage), _CLASS_ORDER.index(blame.cause)
