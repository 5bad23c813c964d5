"""What no policy can switch off of every single row: how far it is from the edited model, and whether it stays the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from uwm_deploy.recipes.policy import Limit
from uwm_deploy.records.evidence import ArtifactEvidence, RepeatCheck, RowParity
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.verdict import Check, statement
from uwm_deploy.stages.gate.evidence import not_run
from uwm_deploy.stages.gate.limits import check_value
from uwm_deploy.stages.gate.measured import Measured
from uwm_deploy.stages.gate.shape import sound_shape

COSINE = {Precision.FP32: 0.99999, Precision.FP16: 0.999, Precision.BF16: 0.999}
"""Smallest cosine of any item with the edited model, by precision."""

COSINE_8_BITS = 0.8
"""In 8 bits single items may turn; whether decisions turn with them is for the policy to say."""

FLOOR_ON_CPU, FLOOR = 1e-5, 1e-3
"""Largest difference of an entry of an embedding of length 1, in float32. Honest graphs are about 3e-7 away on a CPU; a GPU
adds in another order."""

UNDONE, UNDONE_8_BITS = 0.02, 0.15
"""Share of the way back to the original model, over all items of a concept. On the demo honest graphs reach 1e-4 in half
precision and 0.02 in 8 bits."""

LENGTH = 1e-3
"""Difference of an embedding's length from 1 in every graph that normalises, which it does in float32."""

REPEATS_ON_CPU, REPEATS, REPEATS_IN_BATCH_LOW = 0.0, 1e-6, 1e-3
"""Between equal rows: on a CPU, elsewhere, and elsewhere at different places of a batch below float32, where other places
may be rounded otherwise."""

SAME, NEAR, DONE, EVERY_LENGTH = (
    "equal rows, equal embeddings", "every item as in the edited model", "the edit holds for every concept",
    "captions of every length as in the edited model",
)  # fmt: skip
"""Names of the checks."""


def sound_rows(artifact: ArtifactEvidence) -> list[Check]:
    """Of an executed artifact; a part that its evidence lacks was not run, which does not pass."""
    whole = (*_items(artifact), *sound_shape(artifact)) if artifact.safety is not None else ()
    return [*_repeats(artifact), *_lengths(artifact), *_text_lengths(artifact), *whole]


def on_a_cpu(artifact: ArtifactEvidence) -> bool:
    """Whether it ran on a CPU in this process; a server may put rows of others beside its own."""
    return artifact.where.get("provider") == "CPUExecutionProvider"


def differs_between_calls(artifact: ArtifactEvidence) -> bool:
    """Whether two equal calls do not give equal embeddings."""
    return any(value > limit for part in artifact.repeats for value, limit in list(_with_limits(artifact, part))[:1])


def differs_within_a_call(artifact: ArtifactEvidence) -> bool:
    """Whether equal rows at different places of a batch do not get equal embeddings."""
    return any(value > limit for part in artifact.repeats for value, limit in list(_with_limits(artifact, part))[1:])


def off_somewhere(artifact: ArtifactEvidence) -> bool:
    """Whether some item is too far from the edited model, or too near to the original one."""
    least, undone, floor = _limits(artifact)
    if any(part.error or part.cosine_min < least or part.max_abs > floor for part in artifact.text_lengths):
        return True
    return any(
        part.cosine_min < least or part.max_abs > floor or (part.undone or 0.0) > undone
        for concepts in artifact.rows.values()
        for part in concepts.values()
    )


def _limits(artifact: ArtifactEvidence) -> tuple[float, float, float]:
    """Smallest cosine, largest share undone, largest difference."""
    fp32, low = artifact.precision is Precision.FP32, artifact.precision not in COSINE
    floor = (FLOOR_ON_CPU if on_a_cpu(artifact) else FLOOR) if fp32 else 2.0
    return COSINE.get(artifact.precision, COSINE_8_BITS), UNDONE_8_BITS if low else UNDONE, floor


def _with_limits(artifact: ArtifactEvidence, part: RepeatCheck) -> Iterator[tuple[float, float]]:
    limit = REPEATS_ON_CPU if on_a_cpu(artifact) else REPEATS
    yield part.calls, limit
    if part.batch is not None:
        low = artifact.precision is not Precision.FP32 and not on_a_cpu(artifact)
        yield part.batch, REPEATS_IN_BATCH_LOW if low else limit


def _repeats(artifact: ArtifactEvidence) -> Iterator[Check]:
    if not artifact.repeats:
        yield _missing(SAME, artifact)
        return
    n = sum(part.n for part in artifact.repeats)
    pairs = [(*pair, part) for part in artifact.repeats for pair in _with_limits(artifact, part)]
    value, limit, worst = max(pairs, key=lambda pair: pair[0] - pair[1])
    reason = f"the {worst.tower.value} tower gives equal rows other embeddings: it draws numbers, or keeps something"
    yield check_value(SAME, artifact.variant, Measured(value, n), Limit(metric="", at_most=limit, reason=reason))


def _lengths(artifact: ArtifactEvidence) -> Iterator[Check]:
    for tower, value in artifact.lengths.items():
        reason = f"the {tower} graph normalises, so its embeddings must have length 1"
        limit = Limit(metric="", at_most=LENGTH, reason=reason)
        yield check_value(
            f"length of every {tower} embedding", artifact.variant, Measured(value, _items_of(artifact, tower)), limit
        )


def _text_lengths(artifact: ArtifactEvidence) -> Iterator[Check]:
    """Of a text graph that cuts rows: whatever captions the evaluation set has, all lengths must be right."""
    parts = artifact.text_lengths
    if not parts:
        return
    if refused := next((part for part in parts if part.error), None):
        text = f"captions of {refused.tokens} ids: {refused.error}"
        yield statement(EVERY_LENGTH, artifact.variant, False, text)
        return
    least, _, floor = _limits(artifact)
    n, worst = sum(part.n for part in parts), min(parts, key=lambda part: part.cosine_min)
    reason = f"captions of {worst.tokens} ids become something else than in the edited model"
    limit = Limit(metric="", at_least=least, reason=reason)
    yield check_value(EVERY_LENGTH, artifact.variant, Measured(worst.cosine_min, n), limit)
    if artifact.precision is Precision.FP32:
        worst = max(parts, key=lambda part: part.max_abs)
        reason = f"captions of {worst.tokens} ids differ by more than float32 rounds"
        limit = Limit(metric="", at_most=floor, reason=reason)
        yield check_value(f"{EVERY_LENGTH}, largest difference", artifact.variant, Measured(worst.max_abs, n), limit)


def _items(artifact: ArtifactEvidence) -> Iterator[Check]:
    if not artifact.rows:
        yield _missing(NEAR, artifact)
        return
    least, undone, floor = _limits(artifact)
    parts = [(f"{member} of {concept}" if concept else member, concept, part)
             for member, concepts in artifact.rows.items() for concept, part in concepts.items()]  # fmt: skip
    n = sum(part.n for _, _, part in parts)
    where, concept, worst = min(parts, key=lambda part: part[2].cosine_min)
    reason = f"{where} is something else than in the edited model"
    yield check_value(
        NEAR, artifact.variant, Measured(worst.cosine_min, n), Limit(metric="", at_least=least, reason=reason),
        concept=concept,
    )  # fmt: skip
    if artifact.precision is Precision.FP32:
        where, concept, worst = max(parts, key=lambda part: part[2].max_abs)
        reason = f"{where} differs by more than float32 rounds"
        limit = Limit(metric="", at_most=floor, reason=reason)
        yield check_value(f"{NEAR}, largest difference", artifact.variant, Measured(worst.max_abs, n), limit,
                          concept=concept)  # fmt: skip
    yield from _undone(artifact, parts, undone)


def _undone(artifact: ArtifactEvidence, parts: list[tuple[str, str, RowParity]], limit: float) -> Iterator[Check]:
    known = [(where, concept, part.undone, part.n) for where, concept, part in parts if part.undone is not None]
    if not known:
        return
    where, concept, value, n = max(known, key=lambda part: part[2])
    reason = f"{where}: this share of the way from the edited to the original model is gone back"
    found = Limit(metric="", at_most=limit, reason=reason)
    yield check_value(DONE, artifact.variant, Measured(value, n), found, concept=concept)


def _items_of(artifact: ArtifactEvidence, tower: str) -> int:
    return sum(part.n for member, concepts in artifact.rows.items() if tower in member for part in concepts.values())


def _missing(name: str, artifact: ArtifactEvidence) -> Check:
    found = not_run(artifact.variant, "the report does not have it; verify again", "")
    return dataclasses.replace(found, name=name)
