"""Recipes (`export/`): TOML files to records, strictly."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from uwm_deploy.errors import RecipeError
from uwm_deploy.recipes.compile_spec import CompileSpec, ExportSpec, check_compile
from uwm_deploy.recipes.edit_spec import (
    AxisSpec,
    ClosedForm,
    EditSpec,
    EditSpecs,
    StepSpec,
    check_step,
    check_steps,
    only_embeddings,
)
from uwm_deploy.recipes.strict_toml import record_from_toml
from uwm_deploy.records.edit import CLOSED_FORM, Rule, methods_name
from uwm_deploy.records.model import LOCAL
from uwm_deploy.records.names import SEGMENT_IS, is_segment

Family = Literal["hf-clip", "siglip", "open-clip", "llava"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes of the towers, enough to make the model with random weights and without its checkpoint.

    Attributes:
        open_clip: Name of one of open_clip's own configurations; then the tables below only change it.
        text: Entries of the text tower's configuration in the family's own names.
        image: The same for the image tower.
        projection_dim: Size of the shared embedding space, where it is not part of the tables.
    """

    open_clip: str = ""
    text: Mapping[str, int | float | str] = field(default_factory=dict)
    image: Mapping[str, int | float | str] = field(default_factory=dict)
    projection_dim: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where the checkpoint comes from.

    Attributes:
        family: Tower adapter.
        repo: ``"shipped:<folder>"``, a Hugging Face id, or a folder: a full path, or one from the recipe's own folder that
            begins with ``./`` or ``../``.
        revision: Hub commit; needed for a hub id so that a build can be repeated.
        licence: SPDX name or a short statement, shown by `uwm-deploy models`.
        parameters: Approximate number, shown by `uwm-deploy models`.
        architecture: What `--weights random` builds when the checkpoint is not at hand.
        companion: For a vision tower alone: CLIP checkpoint whose text tower it is measured with, like `repo`.
        companion_revision: Hub commit of the companion.
        base: For weights that were trained for safety: the checkpoint they were trained from, like `repo`; what the method
            `trained` compares them with.
        base_revision: Hub commit of the base.
    """

    family: Family
    repo: str
    revision: str = ""
    licence: str = "unknown"
    parameters: str = ""
    architecture: Architecture | None = None
    companion: str = ""
    companion_revision: str = ""
    base: str = ""
    base_revision: str = ""


def is_folder(repo: str) -> bool:
    """Whether `repo`, `base` or `companion` of a model is a folder of this machine: its full path, which `in_folder` makes.

    Everything else is a name, whatever lies in the working folder.
    """
    return Path(repo).is_absolute()


def is_relative(repo: str) -> bool:
    """Whether it is written as a folder's path that starts from somewhere."""
    return repo in (".", "..") or repo.startswith(("./", "../", "~"))


def public_repo(repo: str) -> str:
    """What records call it: a folder's path must not get into a bundle."""
    return LOCAL if is_folder(repo) else repo


def in_folder(source: ModelSource, base: Path) -> ModelSource:
    """The source with full paths in place of relative ones.

    Args:
        source: As a recipe's file names it.
        base: Folder of that file.
    """

    def full(repo: str) -> str:
        is_path = is_relative(repo) or is_folder(repo)
        return str((base / Path(repo).expanduser()).resolve()) if is_path else repo

    return dataclasses.replace(source, repo=full(source.repo), base=full(source.base), companion=full(source.companion))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Which sets are used: by the name of their file in `calibration/` (without `.toml`), or by the path of a TOML file.

    A path starts at the folder of the recipe's own file.

    Attributes:
        calibration: Scores come from it.
        evaluation: SafeGround is measured on it; it must not overlap the other.
    """

    calibration: str
    evaluation: str


def data_in_folder(data: DataSpec, base: Path) -> DataSpec:
    """The sets with their files' paths from the working folder.

    Args:
        data: As a recipe's file names them.
        base: Folder of that file.
    """

    def found(name: str) -> str:
        return str(base / Path(name).expanduser()) if name.endswith(".toml") else name

    return DataSpec(calibration=found(data.calibration), evaluation=found(data.evaluation))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """Settings of training that this model asks for; 0 takes the method's published number (docs/how-to/training.md).

    Attributes:
        rank: Of the adapters.
        alpha: Adapters count ``alpha / rank``.
        rate: Learning rate of Adam.
        epochs: At most so many.
        batch: Quadruples per step.
    """

    rank: int = 0
    alpha: float = 0.0
    rate: float = 0.0
    epochs: int = 0
    batch: int = 0


_NO_ENTRIES = EditSpec(rule=Rule.RATIO, layers=(), keep_mass=1.0, factor=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One file of `export/`: everything about a build that varies with the model.

    Attributes:
        edit: Steps, in the order in which they are made: at most one that selects entries, then at most one in closed form.
        bundle_version: Counts releases, so that an older bundle can be refused; 0 for none.
    """

    format: int
    name: str
    model: ModelSource
    edit: tuple[StepSpec, ...]
    data: DataSpec
    export: ExportSpec
    compile: CompileSpec
    train: TrainSpec = TrainSpec()
    bundle_version: int = 0

    @property
    def entries(self) -> EditSpecs:
        """The step that selects entries; of an edit without one, a step of its method that has nothing to select from."""
        step = self.edit[0]
        return EditSpecs(
            text=step.text or _NO_ENTRIES,
            image=step.image or _NO_ENTRIES,
            method=step.method,
            per_concept=step.per_concept,
            towers=step.towers,
        )

    @property
    def closed_form(self) -> ClosedForm | None:
        """The closed-form step, which is the last one."""
        step = self.edit[-1]
        return ClosedForm(method=step.method, axis=step.axis or AxisSpec()) if step.method in CLOSED_FORM else None

    @property
    def method(self) -> str:
        """Name of the steps."""
        return methods_name(step.method for step in self.edit)


def recipe_from_toml(text: str, *, where: str) -> Recipe:
    """Parses and checks a recipe.

    Raises:
        RecipeError: With the file, the key and the nearest valid key.
    """
    _refuse_older(text, where)
    recipe = record_from_toml(Recipe, text, where)
    if not is_segment(recipe.name):
        raise RecipeError(f"{where}: name is {recipe.name!r}, and names folders", fix=f"use {SEGMENT_IS}")
    check_steps([step.method for step in recipe.edit], f"{where}: edit")
    for number, step in enumerate(recipe.edit):
        check_step(step, f"{where}: edit[{number}]")
    check_reach(recipe, where)
    check_compile(recipe.compile, where)
    if min(dataclasses.astuple(recipe.train)) < 0:
        raise RecipeError(f"{where}: train holds a negative number", fix="use 0 for the published one")
    if recipe.bundle_version < 0:
        raise RecipeError(f"{where}: bundle_version is {recipe.bundle_version}", fix="count from 1; 0 is none")
    return recipe


def _refuse_older(text: str, where: str) -> None:
    """Recipes of earlier releases had one step, in a table, and said how attention is exported."""
    try:
        body = tomllib.loads(text)
    except (ValueError, RecursionError):  # which is said with its line below
        return
    edit, export = body.get("edit"), body.get("export")
    if isinstance(export, dict) and "attention" in export:
        raise RecipeError(
            f"{where}: export.attention is compile.attention now, which is decided for each target",
            fix="move the line from [export] to [compile]",
        )
    if isinstance(edit, dict):
        raise RecipeError(
            f"{where}: edit is one table, and is a list of steps now",
            fix="write [[edit]] in place of [edit], or put it before [edit.text]",
        )


def check_reach(recipe: Recipe, where: str) -> None:
    """Checks that what is used of the model is what a closed-form step changes.

    Args:
        recipe: With the steps that are to be made.
        where: Names it in the message.

    Raises:
        RecipeError: If the model is used by its inner features.
    """
    if recipe.closed_form is not None and recipe.model.family == "llava":
        raise RecipeError(
            f"{where}: {only_embeddings(recipe.closed_form.method)}, and family llava is used by its inner features",
            fix="use --method uwm, which changes the layers before them",
        )
