"""What a run left, read from the folders of its stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from uwm_deploy.bundle.layout import RunFolder, tower_record
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import EditRecord, FitRecord, ScoreRecord
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, Precision, PrecisionPlan
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.stages.job import Made, Plan

R = TypeVar("R")

_RECORDS: Mapping[type, tuple[str, Callable[[RunFolder], Path]]] = {
    ScoreRecord: ("score", lambda folder: folder.score_record),
    FitRecord: ("fit", lambda folder: folder.fit_record),
    EditRecord: ("edit", lambda folder: folder.edit_record),
    VerifyReport: ("verify", lambda folder: folder.report),
    Verdict: ("gate", lambda folder: folder.verdict),
    Manifest: ("package", lambda folder: folder.packaged),
}
"""Record to the stage that leaves it, and its file."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run left. The record of a stage that was not pulled is None; so is that of one that had no work.

    Attributes:
        made: Folders by stage.
        skipped: Target or variant to the reason why it could not be compiled here.
    """

    run_plan: Plan
    made: Mapping[str, tuple[Made, ...]]
    skipped: Mapping[str, str]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.run_plan.recipe.name

    @property
    def work(self) -> Path:
        """The run folder."""
        return self.run_plan.folder.root

    @property
    def out(self) -> Path | None:
        """The bundle, where one was written."""
        return self.run_plan.out if self.made.get("package") else None

    @property
    def reused(self) -> list[str]:
        """Folders that were reused because nothing they depend on changed."""
        return [made.folder.name for folders in self.made.values() for made in folders if made.reused]

    @property
    def score(self) -> ScoreRecord | None:
        """Record of the scores."""
        return self._if_left(ScoreRecord)

    @property
    def fit(self) -> FitRecord | None:
        """Record of the sums of a closed-form step."""
        return self._if_left(FitRecord)

    @property
    def edit(self) -> EditRecord | None:
        """Record of the edit."""
        return self._if_left(EditRecord)

    @property
    def onnx(self) -> tuple[OnnxArtifact, ...]:
        """The exported graphs."""
        return self._per_tower("export", OnnxArtifact)

    @property
    def converted(self) -> tuple[OnnxArtifact, ...]:
        """The graphs in lower precision."""
        return self._per_tower("convert", OnnxArtifact)

    @property
    def engines(self) -> tuple[EngineArtifact, ...]:
        """The engines."""
        return self._per_tower("compile", EngineArtifact)

    @property
    def plan(self) -> PrecisionPlan | None:
        """What precision `auto` chose."""
        if all(made.variant.precision is not Precision.AUTO for made in self.made.get("convert", ())):
            return None
        return read_record(PrecisionPlan, self.run_plan.folder.precision_plan)

    @property
    def report(self) -> VerifyReport | None:
        """What was measured."""
        return self._if_left(VerifyReport)

    @property
    def verdict(self) -> Verdict | None:
        """What the gate said."""
        return self._if_left(Verdict)

    @property
    def manifest(self) -> Manifest | None:
        """Of the bundle."""
        return self._if_left(Manifest)

    def left(self, kind: type[R]) -> R:
        """The record of a stage that was pulled.

        Args:
            kind: Type of the record.

        Raises:
            LookupError: If no stage leaves such a record, or that stage was not pulled.
        """
        stage, file = _RECORDS[kind]
        if not self.made.get(stage):
            raise LookupError(f"stage {stage} was not pulled")
        return read_record(kind, file(self.run_plan.folder))

    def _if_left(self, kind: type[R]) -> R | None:
        return self.left(kind) if self.made.get(_RECORDS[kind][0]) else None

    def _per_tower(self, stage: str, kind: type[R]) -> tuple[R, ...]:
        return tuple(
            read_record(kind, tower_record(made.folder, tower))
            for made in self.made.get(stage, ())
            for tower in TowerName
        )
