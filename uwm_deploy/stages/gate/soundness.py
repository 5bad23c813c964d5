"""What no policy can switch off: without it the numbers that a policy limits are about something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from uwm_deploy.recipes.policy import Limit
from uwm_deploy.records.evidence import (
    ArtifactEvidence,
    BatchCheck,
    DataHealth,
    Direction,
    EditProof,
    Goldens,
    GraphAudit,
    VerifyReport,
)
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.metrics import Proportion, SafetyReport
from uwm_deploy.records.verdict import Check, Result, statement
from uwm_deploy.safeground.canaries import CANARIES, RATIO_LIMIT
from uwm_deploy.stages.gate.evidence import not_run
from uwm_deploy.stages.gate.limits import check_value
from uwm_deploy.stages.gate.measured import Measured
from uwm_deploy.stages.gate.rows import sound_rows
from uwm_deploy.stages.gate.structure import made_anew

GREY_LEVELS = 1.5
"""Two ways to round an 8-bit image may differ by one step."""

LIBRARY_COSINE = 0.9999
"""Of float32 embeddings by the source library and by a tower."""

BATCH_COSINE, BATCH_COSINE_LOW = 0.9999, 0.999
"""Of a row alone and in a batch, float32 and below: there runtimes choose other kernels for other batches."""

NORM_ERROR, NORM_ERROR_LOW = 1e-3, 0.1
"""Of an output's length, float32 and below."""

ANISOTROPY = 0.1
"""Change of the mean cosine of two embeddings."""

HEALTHY = 60.0
"""Percent of items whose members belong together, at the better end of the interval; 50 is chance."""

TURNED = 15.0
"""Points by which fewer items of one set than of the other may go the way from safe to unsafe, at the better end."""

COPIES = 5.0
"""Percent of items that may repeat an earlier one; their number is in no interval, see `clusters`."""

BY_CHANCE = 1e-3
"""Chance below which a concept is not missing from a sample by accident."""

TIES = 1.0
"""Percent of decisions that may become exact ties where the edited model has none."""


def sound_report(report: VerifyReport) -> list[Check]:
    """Of the model, the edit and the data.

    Args:
        report: What was measured; a part that it lacks was not run, which does not pass.
    """
    n = report.evaluation.n
    none = Limit(metric="", at_most=0, reason="scores must not come from what they are measured on")
    changed = report.edited_weights_digest != report.model.weights_digest
    return [
        check_value("calibration items in the evaluation set", "data", Measured(report.calibration_overlap, n), none),
        *([_head_apart(report)] if report.head_digest else []),
        *_data(report.data, report),
        statement(
            "weights come from a checkpoint", "model", report.model.repo != "random", "random weights are never safe"
        ),
        *_goldens(report.goldens),
        statement("the edit changes the weights", "edited", changed, "the edited weights are the original ones"),
        _proof(report.edit_proof),
    ]


def _head_apart(report: VerifyReport) -> Check:
    none = Limit(metric="", at_most=0, reason="a safety head must not be measured on what it was made from")
    found = Measured(report.head_overlap, report.evaluation.n)
    return check_value("items of the safety head in the evaluation set", "data", found, none)


def sound_artifact(artifact: ArtifactEvidence, edited: SafetyReport) -> list[Check]:
    """Of an executed artifact.

    Args:
        artifact: What was measured.
        edited: The edited model on the same items, with the ties that the set itself has.
    """
    name, fp32 = artifact.variant, artifact.precision is Precision.FP32
    checks = [part for tower, audit in artifact.audit.items() for part in _audit(name, tower, audit)]
    checks += made_anew(artifact)
    checks += [_batches(name, artifact.batches, fp32)] if artifact.batches else []
    if not artifact.parity:
        return checks
    finite = all(part.finite for part in artifact.parity)
    checks.append(statement("outputs are finite", name, finite, "NaN or infinity in an output"))
    rows = sum(part.n for part in artifact.parity)
    limit = NORM_ERROR if fp32 or artifact.lengths else NORM_ERROR_LOW
    length = Limit(metric="", at_most=limit, reason="embeddings must have the length of the model's")
    worst = max(part.norm_error for part in artifact.parity)
    checks.append(check_value("length of embeddings", name, Measured(worst, rows), length))
    checks += [_canary(name, tower, ratio) for tower, ratio in artifact.canaries.items()]
    checks += sound_rows(artifact)
    if artifact.safety is None:
        return checks
    alike = Limit(metric="", at_most=ANISOTROPY, reason="embeddings of different inputs must stay as different")
    n = 2 * max(p.n for p in artifact.safety.preference.values())
    found = [abs(change) for change in artifact.anisotropy.values()]
    checks += [check_value("change of anisotropy", name, Measured(max(found), n), alike)] if found else []
    there = artifact.safety.preference
    ties = max(100 * (p.ties - edited.preference[metric].ties) / p.n for metric, p in there.items())
    limit_ties = Limit(
        metric="", at_most=TIES, reason="an exact tie is no decision, and the edited model has none there"
    )
    return [*checks, check_value("further ties", name, Measured(ties, n // 2), limit_ties)]


def _audit(variant: str, tower: str, audit: GraphAudit) -> list[Check]:
    """Weights as they lie in the artifact, and what is computed with them."""
    problems = (*audit.edit, *audit.differ, *audit.lowered)
    return [
        statement(f"weights of the {tower} tower", variant, not problems, _some(problems)),
        statement(f"structure of the {tower} tower", variant, not audit.structure, _some(audit.structure)),
    ]


def _batches(variant: str, parts: Sequence[BatchCheck], fp32: bool) -> Check:
    """The same row alone and among others."""
    limit = BATCH_COSINE if fp32 else BATCH_COSINE_LOW
    for part in parts:
        if part.error:
            text = f"the {part.tower.value} tower does not take {part.batch} rows: {part.error}"
            return statement("rows do not depend on their batch", variant, False, text)
    worst = min(parts, key=lambda part: part.cosine_min)
    text = (
        f"the {worst.tower.value} tower at batch {worst.batch}: cosine {worst.cosine_min:.6g} with the same row alone, "
        f"must be at least {limit:g}"
    )
    return statement("rows do not depend on their batch", variant, worst.cosine_min >= limit, text)


def _canary(variant: str, tower: str, worst: float) -> Check:
    """Nearer to the edited model than to the original one, where they differ most."""
    limit = Limit(
        metric="", at_most=RATIO_LIMIT, reason="on an input where they differ, it is nearer to the original model"
    )
    return check_value(f"canaries of the {tower} tower", variant, Measured(worst, CANARIES), limit)


def _goldens(goldens: Goldens | None) -> list[Check]:
    names = ("pixels as in the source library", "ids as in the source library", "towers as in the source library")
    if goldens is None:
        return [_not_run(name, "model") for name in names]
    pixels = Limit(
        metric="", at_most=GREY_LEVELS, reason="images are prepared in another way than the model was trained"
    )
    ids = Limit(metric="", at_most=0, reason="captions become other ids than the model was trained with")
    least = Limit(metric="", at_least=LIBRARY_COSINE, reason="the tower computes something else than its own library")
    worst = min(goldens.cosine_min.values())
    return [
        check_value(names[0], "model", Measured(goldens.grey_levels, goldens.images), pixels),
        check_value(names[1], "model", Measured(goldens.ids_differ, goldens.captions), ids),
        check_value(names[2], "model", Measured(worst, goldens.images + goldens.captions), least),
    ]


def _proof(proof: EditProof | None) -> Check:
    name = "the edited model is the source with the edit"
    if proof is None:
        return _not_run(name, "edited")
    return statement(name, "edited", not proof.problems, _some(proof.problems))


def _data(data: DataHealth | None, report: VerifyReport) -> list[Check]:
    if data is None:
        return [_not_run("pairing of members", "data")]
    found = [_healthy(f"pairing of {what}", part) for what, part in data.paired.items()]
    lost = [concept for concept, chance in absent_concepts(data, report).items() if chance < BY_CHANCE]
    return [
        *found,
        _healthy("pairing of texts and images", data.aligned),
        *_directions(data.directions, report),
        *_copies(data.copies),
        statement(
            "every calibrated concept is measured",
            "data",
            not lost,
            f"the evaluation set has no item of {', '.join(lost[:5])}",
        ),
    ]


def _directions(directions: Mapping[str, Direction] | None, report: VerifyReport) -> list[Check]:
    """Whether both sets mean the same by unsafe; that neither is right cannot be told from both."""
    if not directions:
        return [_not_run("unsafe as in the calibration set", "data")]
    found = []
    for tower, part in directions.items():
        what = f"{tower}s"
        # Other concepts may go ways of their own, but hardly the opposite one.
        strict = 2 * part.shared >= report.evaluation.n
        least = max(HEALTHY, part.own.value - TURNED) if strict else HEALTHY
        found.append(_turned(f"unsafe {what} as in the calibration set", "evaluation", part.agrees, least))
        least = max(HEALTHY, part.agrees.value - TURNED) if strict else HEALTHY
        found.append(_turned(f"unsafe {what} within the calibration set", "calibration", part.own, least))
    return found


def _turned(name: str, which: str, part: Proportion, least: float) -> Check:
    words = (
        f"only {part.value:.4g}% of {part.n} {which} items (95% interval {part.low:.4g} to {part.high:.4g}) differ from "
        f"safe to unsafe as the calibration items of their concept do; safe and unsafe may be swapped in some rows, or all, "
        f"of one of the two sets"
    )
    return _at_better_end(name, part, least, words)


def _copies(copies: Mapping[str, Proportion] | None) -> list[Check]:
    """Copies make a set look larger than it is."""
    if copies is None:
        return [_not_run("copies in the evaluation set", "data")]
    few = Limit(metric="", at_most=COPIES, reason="items that repeat an earlier one measure nothing new")
    return [
        check_value(f"copies in {name or 'the evaluation set'}", "data", Measured(part.value, part.n), few)
        for name, part in copies.items()
    ]


def absent_concepts(data: DataHealth, report: VerifyReport) -> dict[str, float]:
    """Calibrated concepts that no item measures, with the chance of that in an evaluation set of the same mixture.

    Two sets without a common concept name their concepts differently, and nothing can be said.
    """
    return absent_from(report.evaluation.concepts, report.evaluation.n, data.calibrated_concepts)


def absent_from(concepts: Collection[str], n: int, calibrated: Mapping[str, int]) -> dict[str, float]:
    """The same of n items with some concepts."""
    total = sum(calibrated.values())
    if not set(concepts) & set(calibrated):
        return {}
    return {concept: (1 - count / total) ** n for concept, count in calibrated.items() if concept not in concepts}


def _healthy(name: str, part: Proportion) -> Check:
    """Fails only when even the better end of the interval is near chance."""
    words = (
        f"together in {part.value:.4g}% of {part.n} items (95% interval {part.low:.4g} to {part.high:.4g}), where 50% is "
        f"chance: members may be shuffled"
    )
    return _at_better_end(name, part, HEALTHY, words)


def _at_better_end(name: str, part: Proportion, least: float, words: str) -> Check:
    good = part.high >= least
    return Check(
        name=name,
        subject="data",
        result=Result.PASS if good else Result.FAIL,
        measured=part.value,
        limit=least,
        direction="at_least",
        detail="" if good else words,
        n=part.n,
        low=part.low,
        high=part.high,
    )


def _not_run(name: str, subject: str) -> Check:
    return dataclasses.replace(not_run(subject, "the report does not have it; verify again", ""), name=name)


def _some(problems: Sequence[str]) -> str:
    """The first problems, and how many more there are."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
