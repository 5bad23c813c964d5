"""What a user asks a run for, and the recipe with that in its place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from uwm_deploy.edits.methods import EditOptions, methods_from_name, with_options
from uwm_deploy.errors import InputError, RecipeError
from uwm_deploy.recipes.recipe import (
    Recipe,
    check_reach,
)
from uwm_deploy.recipes.resolve import read_training, recipe_of
from uwm_deploy.records.edit import (
    Method,
    Selection,
)
from uwm_deploy.records.graph import (
    Precision,
    Target,
)
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for; None takes the recipe's value, for `batch_pairs` what fits into memory.

    Attributes:
        leave_out: Concepts that the calibration set is to be used without.
        downstream: Files of what came out behind the edited towers, for the policy's limits on it.
    """

    model: str = "demo"
    checkpoint: Path | None = None
    revision: str | None = None
    original: Path | None = None
    calibration: str | None = None
    evaluation: str | None = None
    leave_out: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    budget: str | None = None
    refittable: bool = False
    method: str | None = None
    selection: str | None = None
    per_concept: bool = False
    towers: tuple[str, ...] = ()
    keep_mass: float | None = None
    factor: float | None = None
    placement: str | None = None
    max_retrieval_loss: float | None = None
    axis: AxisSetting | None = None
    weights: str = "checkpoint"
    policy: str = "default"
    baseline: Path | None = None
    out: Path | None = None
    work: Path | None = None
    device: str = "auto"
    workers: int = 2
    batch_pairs: int | None = None
    score_dtype: str = "fp32"
    bundle_version: int | None = None
    safety_head: Path | None = None
    downstream: tuple[Path, ...] = ()


def resolved_recipe(request: Request) -> Recipe:
    """The recipe with what the user asked for in its place."""
    return with_overrides(recipe_of(request.model)[0], request)


def with_overrides(recipe: Recipe, request: Request) -> Recipe:
    """A recipe with what the user asked for in its place.

    Raises:
        RecipeError: If two things exclude each other.
        InputError: If an option has no effect.
    """
    source = recipe.model
    if request.checkpoint is not None:
        source = dataclasses.replace(source, repo=str(request.checkpoint.resolve()), revision="")
    if request.revision is not None:
        source = dataclasses.replace(source, revision=request.revision)
    edit = with_options(
        recipe.edit,
        EditOptions(
            methods=_methods_of(request),
            selection=Selection(request.selection) if request.selection else None,
            keep_mass=request.keep_mass,
            factor=request.factor,
            per_concept=request.per_concept,
            towers=[TowerName(tower) for tower in request.towers],
            placement=cast(Any, request.placement),
            max_retrieval_loss=request.max_retrieval_loss,
            axis=request.axis,
        ),
    )
    data = dataclasses.replace(
        recipe.data,
        calibration=request.calibration or recipe.data.calibration,
        evaluation=request.evaluation or recipe.data.evaluation,
    )
    spec = recipe.compile
    spec = dataclasses.replace(
        spec,
        targets=tuple(Target(t) for t in dict.fromkeys(request.targets)) or spec.targets,
        precision=tuple(Precision(p) for p in dict.fromkeys(request.precisions)) or spec.precisions,
        float32=(*spec.float32, *request.float32),
        refittable=spec.refittable or request.refittable,
    )
    if spec.quantiser not in ("built-in", "nearest") and Precision.AUTO in spec.precisions:
        raise RecipeError(
            f"compile.quantiser is {spec.quantiser} with precision auto, whose search quantises by itself",
            fix="use int8 or fp8, or the built-in one",
        )
    if request.budget is not None:
        if Precision.AUTO not in spec.precisions:
            raise InputError("--budget has no effect without precision auto", fix="add --precision auto")
        spec = dataclasses.replace(spec, auto=dataclasses.replace(spec.auto, flips=_flips_of(request.budget)))
    version = recipe.bundle_version if request.bundle_version is None else request.bundle_version
    asked = dataclasses.replace(recipe, model=source, edit=edit, data=data, compile=spec, bundle_version=version)
    check_reach(asked, recipe.name)
    return asked


def _methods_of(request: Request) -> tuple[Method, ...]:
    """What the user asked for; a model that `train` made goes through as it is unless an edit on top is asked for."""
    if request.method:
        return methods_from_name(request.method)
    return (Method.TRAINED,) if read_training(Path(request.model)) else ()


def _flips_of(text: str) -> float:
    """Percentage of ``flips=0.5%`` or ``0.5%``.

    Raises:
        InputError: If it says something else. A number without its sign could be a share or percent, so none is guessed.
    """
    name, equals, value = text.strip().rpartition("=")
    try:
        number = float(value.removesuffix("%"))
    except ValueError:
        number = -1.0
    if name.strip() != ("flips" if equals else "") or not 0 < number < 100:
        raise InputError(f"--budget {text!r} is not understood", fix="write it as flips=0.5%")
    if value.endswith("%"):
        return number
    spellings = [f"flips={number:g}%", *([f"flips={100 * number:g}%"] if number < 1 else [])]
    raise InputError(f"--budget {text!r} has no per cent sign", fix=f"write {' or '.join(spellings)}")
