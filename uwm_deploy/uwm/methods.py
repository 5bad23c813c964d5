"""Every method as data: its formula, how it selects, and the settings it was published with (docs/methods.md).

"field" below is the survey in which the project's published numbers were collected; run.sh is the official code's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from uwm_deploy.errors import InputError
from uwm_deploy.recipe import EditSpec, EditSpecs
from uwm_deploy.records import Method, ModelRef, Pairing, Rule, Selection, TowerName


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a method selects and edits in one tower."""

    selection: Selection
    keep_mass: float
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One method.

    Attributes:
        text: Setting when neither a recipe for this method nor the user says otherwise.
        image: The same for the image tower.
        pairing: How both sides of a pair become a score; None leaves it to the recipe, or there are no pairs.
        loss: Name in `uwm.gradient`, for the gradient baselines.
        signed: Whether scores may be negative.
    """

    text: Setting
    image: Setting
    pairing: Pairing | None = None
    loss: Literal["", "gradient-unsafe", "gradient-safe-clip"] = ""
    signed: bool = False

    def of(self, tower: TowerName) -> Setting:
        """Setting of one tower."""
        return self.image if tower is TowerName.IMAGE else self.text


def _setting(selection: Selection, keep_mass: float, factor: float) -> Setting:
    return Setting(selection=selection, keep_mass=keep_mass, factor=factor)


_UWM = _setting(Selection.ADAPTIVE, 0.98, -1.0)
_UWM_HARD = _setting(Selection.HARD, 0.98, -1.0)
_SAFE_CLIP = _setting(Selection.HARD, 0.995, 0.0)
_NOTHING = _setting(Selection.ADAPTIVE, 1.0, 1.0)

PRESETS = {
    # run.sh: out_proj 0.98 and fc2 0.98, alpha -1.
    Method.UWM: Preset(text=_UWM, image=_UWM),
    # run.sh: 0.965 for both towers, alpha 0. The official text scorer selects hard, the vision scorer adaptively.
    Method.GRADIENT_UNSAFE: Preset(
        text=_setting(Selection.HARD, 0.965, 0.0),
        image=_setting(Selection.ADAPTIVE, 0.965, 0.0),
        loss="gradient-unsafe",
    ),
    # run.sh: 0.995 for both towers, alpha 0; both official scorers select hard.
    Method.GRADIENT_SAFE_CLIP: Preset(text=_SAFE_CLIP, image=_SAFE_CLIP, loss="gradient-safe-clip"),
    # Ablations (field 1.6): alpha -1, hard, and the text tower keeps its |W|. No share was published; it is the method's.
    Method.UNSAFE_ONLY: Preset(text=_UWM_HARD, image=_UWM_HARD, pairing=Pairing.UNSAFE_ONLY),
    Method.RATIO_HARD: Preset(text=_UWM_HARD, image=_UWM_HARD, pairing=Pairing.MEAN_OF_RATIOS),
    Method.DIFFERENCE: Preset(text=_UWM_HARD, image=_UWM_HARD, pairing=Pairing.DIFFERENCE, signed=True),
    # The paper's wording of Eq. 10, otherwise the method itself.
    Method.RATIO_OF_MEANS: Preset(text=_UWM, image=_UWM, pairing=Pairing.RATIO_OF_MEANS),
    Method.NONE: Preset(text=_NOTHING, image=_NOTHING),
    Method.TRAINED: Preset(text=_NOTHING, image=_NOTHING),
}
"""Preset of every method."""

_UWM_AND_ABLATIONS = {
    Method.UWM,
    Method.UNSAFE_ONLY,
    Method.RATIO_HARD,
    Method.DIFFERENCE,
    Method.RATIO_OF_MEANS,
}
"""An ablation changes one thing: among these, a recipe's keep_mass and factor stay."""

_GRADIENT_BATCH = {
    "coca": {TowerName.TEXT: 128, TowerName.IMAGE: 32},
    "siglip": {TowerName.TEXT: 128, TowerName.IMAGE: 16},
    "": {TowerName.TEXT: 512, TowerName.IMAGE: 64},
}
"""Pairs per gradient in the official code, by a word in the model's name."""


def selects(method: Method) -> bool:
    """Whether a method scores and selects entries; one that does not has no settings."""
    return method not in (Method.NONE, Method.TRAINED)


def needs_gradients(method: Method) -> bool:
    """Whether a method reads gradients, and so both towers' embeddings of whole quadruples."""
    return bool(PRESETS[method].loss)


def gradient_batch(edit: EditSpec, tower: TowerName, model: ModelRef) -> int:
    """Pairs per gradient: the recipe's, else the published number."""
    named = f"{model.family} {model.name} {model.repo}".lower()
    return edit.gradient_batch or next(sizes[tower] for word, sizes in _GRADIENT_BATCH.items() if word in named)


def pairing_of(method: Method, edit: EditSpec) -> Pairing | None:
    """How both sides of a pair become a score; None when there are no pairs of activations."""
    if not selects(method) or needs_gradients(method):
        return None
    return PRESETS[method].pairing or edit.pairing


def rule_of(method: Method, edit: EditSpec) -> Rule:
    """How a layer's final score is formed. The weight prior of a tower is kept in every ablation."""
    return Rule.MEAN_ABS_GRADIENT if needs_gradients(method) else edit.rule


def with_method(
    edits: EditSpecs,
    *,
    method: Method | None = None,
    selection: Selection | None = None,
    keep_mass: float | None = None,
    factor: float | None = None,
    per_concept: bool = False,
    chosen_towers: Collection[TowerName] = (),
) -> EditSpecs:
    """What is edited when the user asks for a method.

    Args:
        edits: The recipe's.
        method: Another one than the recipe's brings its own settings; None is the recipe's. Between `uwm` and its
            ablations only the selection changes.
        selection: Instead of the method's, both towers.
        keep_mass: Instead of the method's, both towers.
        factor: Instead of the method's, both towers.
        per_concept: One score per concept, selections united.
        chosen_towers: Towers that are edited; none leaves it to the recipe.

    Raises:
        InputError: If settings are given for the method that edits nothing, or one is out of its range.
    """
    chosen = method or edits.method
    given: dict[str, Any] = {"selection": selection, "keep_mass": keep_mass, "factor": factor}
    given = {key: value for key, value in given.items() if value is not None}
    if not selects(chosen) and (given or per_concept):
        option = next(iter(given), "per_concept").replace("_", "-")
        what = "edits nothing" if chosen is Method.NONE else "takes weights as they were trained"
        raise InputError(f"method {chosen.value} {what}, so --{option} has no effect", fix="leave the option out")
    if keep_mass is not None and not 0.0 < keep_mass < 1.0:
        raise InputError(f"--keep-mass is {keep_mass}", fix="use a share between 0 and 1")
    if factor is not None and not math.isfinite(factor):
        raise InputError(f"--factor is {factor}", fix="use a number, such as -1 or 0")
    towers = {
        tower.value: dataclasses.replace(edits.of(tower), **(_brought(chosen, edits.method, tower) | given))
        for tower in TowerName
    }
    wanted = per_concept or (edits.per_concept and selects(chosen))
    return EditSpecs(
        text=towers["text"],
        image=towers["image"],
        method=chosen,
        per_concept=wanted,
        towers=tuple(t for t in (TowerName.TEXT, TowerName.IMAGE) if t in (chosen_towers or edits.towers)),
    )


def _brought(chosen: Method, recipe: Method, tower: TowerName) -> dict[str, Any]:
    """Settings of one tower that a method brings instead of those of a recipe for another method."""
    if chosen is recipe:
        return {}
    setting = PRESETS[chosen].of(tower)
    if {chosen, recipe} <= _UWM_AND_ABLATIONS:
        return {"selection": setting.selection}
    return dataclasses.asdict(setting)
