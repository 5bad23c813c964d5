"""Where the files of a build leave its exported float32 graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uwm_deploy.records.evidence import Evidence
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.model import TowerName

WalkedStage = Literal["export", "convert", "compile"]
"""Stage that made a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkedValue:
    """One intermediate value.

    Attributes:
        value: Its name in both graphs.
        op: Operator that makes it in the reference.
        layer: Module path of the weight that enters there; empty when none does.
        after: Nearest layer before it.
        own: Relative error (of the Euclidean norm) when the part before it is given the reference's values.
        whole: Relative error in the graph as a whole.
        max_abs: Largest absolute difference in the graph as a whole.
        finite: Whether it is finite wherever the reference is.
    """

    value: str
    op: str
    layer: str
    after: str
    own: float
    whole: float
    max_abs: float
    finite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Something that differs in the files themselves.

    Attributes:
        layer: Module path, or the nearest layer before it.
        what: Name of the weight or attribute.
        detail: How it differs.
    """

    layer: str
    what: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWalk:
    """One graph file of one tower.

    Attributes:
        evidence: `not run` when the file cannot be walked here; `reason` says why.
        tolerance: Of the own error of a part; 0 for the exported graph, which is compared with its weights.
        inputs: Rows it was run on.
        differences: What differs in the files, without running anything.
        first: First value, in the order of the graph, whose own error is beyond the tolerance.
        values: Every value that was compared, in that order.
        canary_ratio: Of the file as it is served; None without canaries.
        note: What else is worth knowing.
    """

    variant: str
    tower: TowerName
    stage: WalkedStage
    precision: Precision
    evidence: Evidence
    reason: str = ""
    tolerance: float = 0.0
    inputs: int = 0
    differences: tuple[Difference, ...] = ()
    first: WalkedValue | None = None
    values: tuple[WalkedValue, ...] = ()
    canary_ratio: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Every file that was looked at, in the order it was made.

    Attributes:
        findings: One line per variant and tower: the first stage and layer that leaves the reference, or that none does.
    """

    name: str
    walks: tuple[StageWalk, ...]
    findings: tuple[str, ...]
