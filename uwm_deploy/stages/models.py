"""The models of a run in memory, each loaded when it is first asked for."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path

from uwm_deploy.bundle.head import HeadFiles
from uwm_deploy.data.order import some_of
from uwm_deploy.data.ranks import Ranks
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.edits.applied import select_and_apply
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.errors import IntegrityError
from uwm_deploy.recipes.recipe import ModelSource
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import CLOSED_FORM, EditRecord, ScoreRecord
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.memory import without_collection
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.stages.job import Notes, Plan
from uwm_deploy.towers.batch_size import USUAL_PAIRS, pairs_that_fit
from uwm_deploy.towers.protocol import LoadedModel


class Models:
    """The models of a run, and the streams of pairs that they are fed with.

    Args:
        plan: What the run is made from.
        notes: Says what is loaded.
    """

    def __init__(self, plan: Plan, notes: Notes) -> None:
        self._plan, self._notes = plan, notes

    @cached_property
    def original(self) -> LoadedModel:
        """The source model."""
        return self.load_original()

    @cached_property
    def edited(self) -> LoadedModel:
        """The edited model, read back from the saved folder, so that what was saved is what is exported."""
        return self.load_edited()

    def forget_original(self) -> None:
        """Frees the memory of the source model, or of what it was edited into; who needs it loads it again."""
        self.__dict__.pop("original", None)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The runtime's tokenizer with the source model's vocabulary."""
        return Tokenizer(self.original.tokenizer_json, self.original.ref.text)

    def load_original(self) -> LoadedModel:
        """The source model, loaded anew."""
        plan = self._plan
        random = plan.weights == "random"
        return self._load("", plan.checkpoint, companion=plan.companion, random=random)

    def load_trained(self) -> LoadedModel:
        """The trained weights, of the method `trained`, loaded anew."""
        trained = self._plan.trained
        assert trained is not None
        return self._load(" (trained)", self._plan.trained_folder, source=trained)

    def load_edited(self) -> LoadedModel:
        """The edited model with its safety head, loaded anew.

        Raises:
            IntegrityError: If it is not the one of its record, or the head was trained on another.
        """
        folder = self._plan.folder
        model = self._load(" (edited)", folder.edited_model)
        if model.ref.weights_digest != read_record(EditRecord, folder.edit_record).edited_weights_digest:
            raise IntegrityError(
                "the saved edited model is not the one its record describes", fix="remove the run folder"
            )
        if self._plan.head is not None:
            self._add_head(model, self._plan.head)
        return model

    def before_closed_form(self, ranks: Ranks) -> tuple[LoadedModel, LoadedModel | None]:
        """The model that the closed-form step is made on, and the source model where another step comes before.

        Args:
            ranks: The processes that all ask for it now.
        """
        plan = self._plan
        if plan.recipe.entries.method in CLOSED_FORM:
            return self.original, None
        if plan.trained:
            return self.load_trained(), self.original
        model = self.load_original()
        score = ranks.first_only(lambda: read_record(ScoreRecord, plan.folder.score_record))
        ranks.together(lambda: select_and_apply(model, score, plan.folder.scores, plan.recipe.entries))
        return model, self.original

    def batch_pairs(self, ranks: Ranks) -> dict[TowerName, int]:
        """Pairs per forward pass: what was asked for, else what memory holds; the same in every process.

        Args:
            ranks: The processes that all ask for it now.
        """
        asked, model = self._plan.batch_pairs, self.original

        def fits() -> dict[TowerName, int]:
            return {tower: asked or pairs_that_fit(model.tower(tower), model.ref) for tower in TowerName}

        found = ranks.gathered(ranks.together(fits))
        return {tower: min(part[tower] for part in found) for tower in TowerName}  # equal, so that sums are

    def pairs(
        self,
        source: QuadrupleSource,
        tower: TowerName,
        *,
        batch_pairs: int,
        workers: int = 0,
        quiet: bool = False,
        sort_by_length: bool = True,
    ) -> PairStream:
        """Pairs of a set as they are fed to a tower.

        Args:
            source: The set.
            tower: Which tower.
            batch_pairs: Pairs per batch.
            workers: Decoding processes.
            quiet: Says nothing of its progress.
            sort_by_length: Puts captions of about one length into one batch.
        """
        return PairStream(
            source,
            tower,
            self.original.ref.image,
            self.tokenizer,
            batch_pairs=batch_pairs,
            workers=workers,
            max_broken_share=self._plan.calibration.max_broken_share,
            progress=_silent if quiet else self._notes.progress,
            sort_by_length=sort_by_length,
        )

    def some_pairs(self, tower: TowerName, count: int) -> PairStream:
        """Some pairs of the calibration set, evenly spaced, at full length.

        Args:
            tower: Which tower.
            count: Largest number of pairs.
        """
        source = some_of(self._plan.calibration_source, count)
        return self.pairs(source, tower, batch_pairs=USUAL_PAIRS[TowerName.IMAGE], quiet=True, sort_by_length=False)

    def _load(
        self,
        words: str,
        folder: Path | None,
        *,
        companion: Path | None = None,
        random: bool = False,
        source: ModelSource | None = None,
    ) -> LoadedModel:
        with without_collection():
            import torch

            from uwm_deploy.towers.load import load_model
            from uwm_deploy.towers.threads import fit_threads

        plan = self._plan
        recipe = dataclasses.replace(plan.recipe, model=source) if source else plan.recipe
        with self._notes.stage("load", f"{recipe.name}{words}"):
            found = load_model(
                recipe,
                folder=folder,
                companion=companion,
                weights="random" if random else "checkpoint",
                device=plan.device,
            )
        fit_threads(found.source)
        on_cpu = next(found.source.parameters()).device.type == "cpu"
        if on_cpu and plan.device == "auto" and torch.cuda.is_available():
            self._notes.line("load       no GPU has room for the model; it runs on the CPU")
        return found

    def _add_head(self, model: LoadedModel, head: HeadFiles) -> None:
        from uwm_deploy.towers.safety_head import head_from_bytes, with_head

        if head.record.edited_weights_digest != model.ref.weights_digest:
            raise IntegrityError(
                f"the safety head in {self._plan.safety_head} was trained on other weights than this edit makes",
                fix="run `uwm-deploy train safety-head` with the options of this build",
            )
        model.image = with_head(model.image, head_from_bytes(head.weights, head.record.shape))


def _silent(*_: object) -> None:
    """Progress of a part that takes a second."""
