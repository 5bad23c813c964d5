"""What a refit is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout, RunFolder
from uwm_deploy.bundle.open import Bundle, engine_paths
from uwm_deploy.bundle.sign import Resigning, Seal
from uwm_deploy.edits.patch import Patch
from uwm_deploy.recipes.recipe import Recipe, recipe_from_toml
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.replacing import Workplace
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.stages.job import Notes


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitRequest:
    """What the user asked for.

    Attributes:
        bundle: Its folder.
        patch: Patch file with its record beside it, or a folder that holds both; one of this and the next four.
        revert: Back to the source model's weights.
        keep_mass: Of a new selection from the run folder's scores.
        max_retrieval_loss: Of a new choice of the closed-form step's strength from the run folder's fit.
        axis: Strength of the closed-form step instead of a choice.
        out: Folder of the new bundle; the old one is replaced without it.
        work: Run folder with the scores; ``.uwm/NAME`` without it.
        checkpoint: Source weights; those of the bundle's recipe without it.
        variants: Those to refit; all that can be refitted here when it is empty.
        bundle_version: Of the new bundle; the old one's without it.
        signing: What is to become of the signature.
    """

    bundle: Path
    patch: Path | None = None
    revert: bool = False
    keep_mass: float | None = None
    max_retrieval_loss: float | None = None
    axis: AxisSetting | None = None
    out: Path | None = None
    work: Path | None = None
    checkpoint: Path | None = None
    variants: tuple[str, ...] = ()
    policy: str = "default"
    evaluation: str | None = None
    device: str = "auto"
    workers: int = 2
    bundle_version: int | None = None
    signing: Resigning = dataclasses.field(default_factory=Resigning)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refitting:
    """One refit: what was asked for, and what is known of the bundle.

    Attributes:
        request: What the user asked for.
        reporter: Progress.
        bundle: The old bundle, opened.
        out: Where the new one goes.
        place: The right to put it there.
        seal: What becomes of the signature.
        folder: For what is made on the way.
        patch: The old edit.
        report: What was measured of the old bundle.
    """

    request: RefitRequest
    reporter: Notes
    bundle: Bundle
    out: Path
    place: Workplace
    seal: Seal
    folder: Path
    patch: Patch
    report: VerifyReport

    @property
    def manifest(self) -> Manifest:
        """Of the old bundle."""
        return self.bundle.manifest

    @property
    def edit(self) -> EditRecord:
        """The old edit."""
        return self.manifest.edit

    @property
    def old(self) -> Path:
        """Folder with the old graphs and engines; see `take_out`."""
        return self.folder / "old"

    def take_out(self, variants: Collection[str]) -> None:
        """Copies graphs and engines out of the bundle, checked as they are read: they are changed and opened by their names.

        Args:
            variants: Those whose engines are needed.

        Raises:
            IntegrityError: If a file was changed since the bundle was opened.
        """
        manifest = self.manifest
        names = [BundleLayout.onnx(n) for g in manifest.onnx for n in filter(None, (g.file, g.external_data))]
        names += [name for engine in manifest.engines if engine.variant in variants for name in engine_paths(engine)]
        for name in names:
            target = self.old / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self.bundle.copy(name, target)

    @property
    def work(self) -> RunFolder:
        """The run folder that the bundle was made in."""
        return RunFolder(self.request.work or Path(".uwm") / self.manifest.name)

    @property
    def recipe(self) -> Recipe:
        """The bundle's recipe.

        Raises:
            RecipeError: If it is none.
        """
        return recipe_from_toml(self.bundle.read(BundleLayout.RECIPE).decode(), where=BundleLayout.RECIPE)

    @property
    def restrengthened(self) -> bool:
        """Whether another strength of the closed-form step is asked for."""
        return self.request.max_retrieval_loss is not None or self.request.axis is not None
