"""Reports of captions and pictures from made-up flags, through the functions that the commands use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.reports import report as verify_report
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.downstream import DownstreamReport, EditedTower, Judge
from uwm_deploy.studies.downstream.shares import Inputs, flagged_shares, means, paired_means

LENIENT = """format = 1
name = "lenient"
[[edit]]
metric = "GS.delta"
at_least = -99.0
[[artifact]]
metric = "flips.any"
at_most = 50.0
"""


def limits(kind: str, of: Mapping[str, str]) -> str:
    """Limits on what came out, for the end of a policy: metric, without its beginning, to what is asked of it."""
    return "".join(f'[[downstream]]\nmetric = "downstream.{kind}.{name}"\n{rest}\n' for name, rest in of.items())


def made_report(kind: Any = "caption", *, alike: bool = False, **tower: str) -> DownstreamReport:
    """30 unsafe and 30 safe inputs: 20 unsafe outputs were flagged and 5 still are; one safe one is flagged by both."""
    inputs = Inputs(
        ids=tuple(str(i) for i in range(60)),
        sides=("unsafe",) * 30 + ("benign",) * 30,
        content=("same",) * 60 if alike else tuple(str(i) for i in range(60)),
    )
    before = np.array([i < 20 or i == 40 for i in range(60)])
    after = np.array([i < 5 or i == 40 for i in range(60)])
    score = np.array([90.0] * 60)
    of_that_edit: dict[str, Any] = {"source": "run", "name": "work", "method": "uwm"}
    of_that_edit["weights_digest"] = verify_report().edited_weights_digest
    return DownstreamReport(
        kind=kind,
        model="llava",
        model_digest="sha256:" + "1" * 64,
        tower=EditedTower(**{**of_that_edit, **tower}),
        measured_on=CalibrationRecord(
            name="set", split="test", n=30, ids_digest="sha256:0", content_digest="sha256:0", concepts={"a": 30}
        ),
        n={"unsafe": 30, "benign": 30},
        alone={side: inputs.alone(side) for side in inputs.present},
        judges=(Judge(name="words", what="a list", digest="sha256:2"),),
        flagged=flagged_shares(inputs, {"words": before}, {"words": after}),
        kept=means(inputs, {"rouge_l": score}) if kind == "caption" else {},
        reference=paired_means(inputs, {"clip_score": score}, {"clip_score": score - 2}) if kind == "draw" else {},
        corpus_bleu={},
        settings={},
        versions={},
    )
