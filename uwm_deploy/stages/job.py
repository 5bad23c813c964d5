"""What a stage is given: the plan of the run, what the stages before it left, and where its own files go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from uwm_deploy.bundle.head import HeadFiles, read_head
from uwm_deploy.bundle.layout import RunFolder
from uwm_deploy.data.open import open_source
from uwm_deploy.data.ranks import ALONE, Ranks
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.recipes import shipped
from uwm_deploy.recipes.data_set import CalibrationSet
from uwm_deploy.recipes.recipe import ModelSource, Recipe, is_folder
from uwm_deploy.records.graph import Precision, Provider, Target
from uwm_deploy.records.model import Digest

if TYPE_CHECKING:  # so that a change of a verdict makes no score stale
    from uwm_deploy.bundle.downstream import GivenReports
    from uwm_deploy.recipes.policy import Policy
    from uwm_deploy.records.data import CalibrationRecord
    from uwm_deploy.records.downstream import DownstreamReport
    from uwm_deploy.records.edit import EditRecord
    from uwm_deploy.records.evidence import VerifyReport
    from uwm_deploy.records.training import TrainingRecord
    from uwm_deploy.records.verdict import Baseline, Verdict

T = TypeVar("T")

Dtype = Literal["float32", "bfloat16"]


class Notes(Protocol):
    """Says what runs."""

    def line(self, text: str) -> None:
        """One log line."""

    def stage(self, name: str, text: str) -> AbstractContextManager[None]:
        """Announces a piece of work, and says how long it took."""

    def progress(self, label: str, done: int, total: int) -> None:
        """One step of it; a total of 0 is not known."""


class CardOf(Protocol):
    """Renders the model card, which is a view and so lies above the stages."""

    def __call__(
        self,
        edit: EditRecord,
        calibration: CalibrationRecord,
        *,
        name: str,
        licence: str,
        report: VerifyReport | None = None,
        verdict: Verdict | None = None,
        bundle: bool = False,
    ) -> str:
        """The card as Markdown."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a run is made from, resolved before anything is fetched or computed.

    Attributes:
        recipe: With what the user asked for in its place. Its model is the source model.
        recipe_text: The recipe's file.
        calibration: Definition of the set that scores and sums come from.
        calibration_base: Folder that its relative paths start from.
        evaluation: Definition of the set that is measured.
        evaluation_text: Its file.
        evaluation_base: Folder that its relative paths start from.
        trained: Weights that were trained for safety, of the method `trained`.
        training: What is known of their training.
        policy: The limits of the gate.
        policy_digest: Of its file.
        baseline: Accepted report to compare with, and the digest of its file.
        folder: Where the stages' folders go.
        out: Where the bundle goes.
        asked_targets: Targets that the user named; one of them that cannot be compiled is an error.
        weights: `random` takes only the architecture.
        device: `auto`, `cpu` or `cuda`.
        workers: Decoding processes.
        batch_pairs: Pairs per forward pass; None takes what fits into memory.
        score_dtype: Of the scoring pass.
        safety_head: Folder of a trained head that goes into the image graph.
        given: What came out behind the edited towers, for the policy's limits on it.
    """

    recipe: Recipe
    recipe_text: str
    calibration: CalibrationSet
    calibration_base: Path | None
    evaluation: CalibrationSet
    evaluation_text: str
    evaluation_base: Path | None
    trained: ModelSource | None
    training: TrainingRecord | None
    policy: Policy
    policy_digest: Digest
    baseline: tuple[Baseline, Digest] | None
    folder: RunFolder
    out: Path
    asked_targets: frozenset[Target] = frozenset()
    weights: Literal["checkpoint", "random"] = "checkpoint"
    device: str = "auto"
    workers: int = 2
    batch_pairs: int | None = None
    score_dtype: Dtype = "float32"
    safety_head: Path | None = None
    given: GivenReports | None = None

    @property
    def downstream(self) -> tuple[DownstreamReport, ...]:
        """What came out behind the edited towers, at most one report of a kind."""
        return self.given.reports if self.given else ()

    @cached_property
    def checkpoint(self) -> Path | None:
        """Folder of the source checkpoint; None for random weights of the recipe's own architecture."""
        source = self.recipe.model
        if self.weights == "random" and source.architecture and not is_folder(source.repo):
            return None
        return shipped.checkpoint_folder(source.repo, source.revision, family=source.family)

    @cached_property
    def companion(self) -> Path | None:
        """Folder of the checkpoint that a vision tower alone is measured with."""
        source = self.recipe.model
        if not source.companion or self.checkpoint is None:
            return None
        return shipped.checkpoint_folder(source.companion, source.companion_revision, family="hf-clip")

    @cached_property
    def trained_folder(self) -> Path | None:
        """Folder of the trained weights; None with another method."""
        source = self.trained
        return shipped.checkpoint_folder(source.repo, source.revision, family=source.family) if source else None

    @cached_property
    def calibration_source(self) -> QuadrupleSource:
        """The set that scores and sums come from."""
        return open_source(self.calibration, base=self.calibration_base)

    @cached_property
    def evaluation_source(self) -> QuadrupleSource:
        """The set that is measured."""
        return open_source(self.evaluation, base=self.evaluation_base)

    @cached_property
    def head(self) -> HeadFiles | None:
        """The safety head that goes into the image graph."""
        return read_head(self.safety_head) if self.safety_head else None

    @property
    def head_digest(self) -> Digest:
        """Of the safety head; empty without one."""
        return self.head.digest if self.head else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One of several folders that a stage leaves.

    Attributes:
        name: Behind the stage's name in the folder's; empty where there is one folder only.
        precision: Of the graphs or engines.
        target: What the engines are for.
        provider: Execution provider of ONNX Runtime.
    """

    name: str = ""
    precision: Precision | None = None
    target: Target | None = None
    provider: Provider = "any"


ONLY = Variant()
"""The one variant of a stage that leaves one folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A finished folder of a stage.

    Attributes:
        stage: Its name.
        variant: Which of the stage's folders.
        folder: The folder.
        digest: Of the names and bytes of its files.
        reused: Whether it was there already.
        begun: ISO time at which the stage began; empty where an earlier release made it, or another process.
    """

    stage: str
    variant: Variant
    folder: Path
    digest: Digest
    reused: bool
    begun: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a stage's `make` is given.

    Attributes:
        stage: Name of the stage.
        plan: What the run is made from.
        variant: Which of the stage's folders is made.
        inputs: What the stages that it reads left, by stage.
        key: Digest of everything that the folder depends on.
        notes: Progress and lines for the user.
        card: Renders the model card.
        ranks: The processes that share the work.
        kept: Objects that the stages of a run share, one of a type.
    """

    stage: str = ""
    plan: Plan
    variant: Variant = ONLY
    inputs: Mapping[str, tuple[Made, ...]] = dataclasses.field(default_factory=dict)
    key: str = ""
    notes: Notes
    card: CardOf
    ranks: Ranks = ALONE
    kept: dict[object, object] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        """Where the stages' folders are."""
        return self.plan.folder

    def shared(self, kind: Callable[[Plan, Notes], T]) -> T:
        """The run's one object of a type, made when it is first asked for."""
        if kind not in self.kept:
            self.kept[kind] = kind(self.plan, self.notes)
        found: T = self.kept[kind]  # type: ignore[assignment]
        return found
