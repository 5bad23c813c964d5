"""Whether an artifact keeps the edited model's neighbourhoods and spread, which decide what a search over it finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from uwm_deploy.recipes.policy import Limit
from uwm_deploy.records.evidence import ArtifactEvidence
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.verdict import Check
from uwm_deploy.stages.gate.evidence import not_run
from uwm_deploy.stages.gate.limits import check_value
from uwm_deploy.stages.gate.measured import Measured

NEIGHBOURS = {Precision.FP32: 0.9, Precision.FP16: 0.85, Precision.BF16: 0.85}
"""Least mean overlap of the ten nearest neighbours. Honest graphs reach 1.0 and 0.998 on the demo; a set with the same
caption many times has more than ten equally near ones, of which rounding chooses others."""

NEIGHBOURS_8_BITS = 0.5
"""The same in 8 bits, where the demo has 0.93."""

SPREAD, SPREAD_8_BITS = 0.01, 0.1
"""Largest change of the total variance, as a share of the edited model's."""

NAME = "neighbourhoods of the edited model"


def sound_shape(artifact: ArtifactEvidence) -> Iterator[Check]:
    """Of an executed artifact; evidence without it was not run, which does not pass."""
    found = artifact.geometry
    if found is None:
        missing = not_run(artifact.variant, "the report does not have it; verify again", "")
        yield dataclasses.replace(missing, name=NAME)
        return
    least = NEIGHBOURS.get(artifact.precision, NEIGHBOURS_8_BITS)
    spread = SPREAD if artifact.precision in NEIGHBOURS else SPREAD_8_BITS
    n = artifact.safety.preference["GS"].n if artifact.safety is not None else 0
    for kind, part in found.neighbours.items():
        reason = f"an item's ten nearest neighbours ({kind}) are others than in the edited model"
        limit = Limit(metric="", at_least=least, reason=reason)
        yield check_value(f"{NAME}, {kind}", artifact.variant, Measured(part.value, part.n), limit)
    for tower, ratio in found.spread.items():
        limit = Limit(metric="", at_most=spread, reason=f"{tower} embeddings lie closer together, or further apart")
        yield check_value(f"spread of {tower} embeddings", artifact.variant, Measured(abs(ratio - 1), n), limit)
