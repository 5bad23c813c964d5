"""Every method as data: its formula, how it selects, and the settings it was published with (docs/background/methods.md).

In comments, "field" is the survey in which the published numbers were collected, and run.sh is a script of the official
code.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from uwm_deploy.edits.axis import require_valid
from uwm_deploy.errors import InputError
from uwm_deploy.recipes.edit_spec import AxisSpec, EditSpec, EditSpecs, StepSpec, check_steps
from uwm_deploy.records.edit import CLOSED_FORM, Method, Pairing, Rule, Selection, methods_name
from uwm_deploy.records.model import Architecture, TowerName
from uwm_deploy.records.strength import AxisSetting


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
        loss: Name of a loss in `edits.gradient`, for the gradient baselines.
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
    # Closed form (docs/background/safety-axis.md): nothing is selected.
    Method.SAFETY_AXIS: Preset(text=_NOTHING, image=_NOTHING),
    Method.LEACE: Preset(text=_NOTHING, image=_NOTHING),
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
"""Between these methods a recipe's keep_mass and factor stay, since an ablation changes one thing only."""

_GRADIENT_BATCH = {
    "coca": {TowerName.TEXT: 128, TowerName.IMAGE: 32},
    "siglip": {TowerName.TEXT: 128, TowerName.IMAGE: 16},
    "clip": {TowerName.TEXT: 512, TowerName.IMAGE: 64},
}
"""Pairs per gradient in the official code, by architecture."""


def selects(method: Method) -> bool:
    """Whether a method scores and selects entries; other methods have no settings for it."""
    return method not in (Method.NONE, Method.TRAINED, *CLOSED_FORM)


def methods_from_name(name: str) -> tuple[Method, ...]:
    """Steps that a name such as ``uwm+safety-axis`` lists.

    Raises:
        InputError: If it names no method, or steps that cannot follow each other.
    """
    found = []
    for part in name.split("+"):
        try:
            found.append(Method(part.strip()))
        except ValueError as error:
            near = difflib.get_close_matches(part.strip(), [*Method], n=1, cutoff=0.3)
            known = ", ".join(Method)
            raise InputError(
                f"there is no method {part.strip()!r}",
                fix=f"did you mean {near[0]}? Known: {known}" if near else f"known: {known}",
            ) from error
    check_steps(found, f"method {name}")
    return tuple(found)


def needs_gradients(method: Method) -> bool:
    """Whether a method reads gradients, and so both towers' embeddings of whole quadruples."""
    return bool(PRESETS[method].loss)


def gradient_batch(edit: EditSpec, tower: TowerName, architecture: Architecture) -> int:
    """Pairs per gradient: the recipe's, else the published number."""
    return edit.gradient_batch or _GRADIENT_BATCH[architecture][tower]


def pairing_of(method: Method, edit: EditSpec) -> Pairing | None:
    """How both sides of a pair become a score; None when there are no pairs of activations."""
    if not selects(method) or needs_gradients(method):
        return None
    return PRESETS[method].pairing or edit.pairing


def rule_of(method: Method, edit: EditSpec) -> Rule:
    """How a layer's final score is formed. The weight prior of a tower is kept in every ablation."""
    return Rule.MEAN_ABS_GRADIENT if needs_gradients(method) else edit.rule


def axis_from_text(text: str) -> AxisSetting:
    """Parses ``g=0.7,o=0.5,kappa=0.4,a=1,tau=0``; rho, axes and the repel gains have defaults and may be left out.

    Raises:
        InputError: If a name or a number is not understood, or a setting without a default is missing.
    """
    fields = {f.name: f for f in dataclasses.fields(AxisSetting)}
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in fields or name in found:
            what = "is given twice" if name in found else "is no setting of the axis"
            raise InputError(f"{name!r} {what}", fix=f"name each once: {', '.join(fields)}")
        try:
            found[name] = int(value) if name == "axes" else float(value)
        except ValueError as error:
            wanted = "a whole number, such as axes=2" if name == "axes" else "a number, such as g=0.7"
            raise InputError(f"{part.strip()!r} is not understood", fix=f"give {wanted}") from error
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in found]
    if missing:
        raise InputError(f"the axis setting lacks {', '.join(missing)}", fix="e.g. g=0.7,o=0.5,kappa=0.4,a=1,tau=0")
    setting = AxisSetting(**found)
    require_valid(setting)
    return setting


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions:
    """Settings of a user that take precedence over a recipe's; None and empty values leave the recipe's.

    Attributes:
        methods: Steps.
        selection: Of the step that selects entries, both towers; likewise `keep_mass`, `factor` and `per_concept`.
        towers: Towers that are edited.
        placement: Of the closed-form step; likewise `max_retrieval_loss` and `axis`.
        max_retrieval_loss: See `AxisSpec`.
        axis: Setting of the safety axis; None lets the strength be chosen.
    """

    methods: tuple[Method, ...] = ()
    selection: Selection | None = None
    keep_mass: float | None = None
    factor: float | None = None
    per_concept: bool = False
    towers: Collection[TowerName] = ()
    placement: Literal["auto", "weights", "embedding"] | None = None
    max_retrieval_loss: float | None = None
    axis: AxisSetting | None = None


def with_options(steps: tuple[StepSpec, ...], options: EditOptions) -> tuple[StepSpec, ...]:
    """Steps of a recipe with the user's settings in place of its own.

    Args:
        steps: The recipe's.
        options: Another method than the recipe's brings its own settings; between `uwm` and its ablations only the
            selection changes.

    Raises:
        InputError: If an option has nothing to act on, or is out of its range.
    """
    wanted = options.methods or tuple(step.method for step in steps)
    closed = wanted[-1] in CLOSED_FORM
    name = methods_name(wanted)
    if closed and options.towers:
        raise InputError(f"method {name} edits both towers, so --tower has no effect", fix="leave the option out")
    axis_options = {
        "placement": options.placement,
        "max-retrieval-loss": options.max_retrieval_loss,
        "axis": options.axis,
    }
    given = [option for option, value in axis_options.items() if value is not None]
    if given and not closed:
        raise InputError(
            f"method {name} has no closed-form step, so --{given[0]} has no effect", fix="use --method safety-axis"
        )
    made = [_entries_step(steps, wanted, options)] if wanted[0] not in CLOSED_FORM else _refused_entries(name, options)
    return (*made, *([_closed_step(steps, wanted[-1], options)] if closed else []))


def _refused_entries(name: str, options: EditOptions) -> list[StepSpec]:
    """A method that selects nothing takes no options for it."""
    given = _entry_options(options)
    if given:
        raise InputError(f"method {name} selects nothing, so --{given[0]} has no effect", fix="leave the option out")
    return []


def _entry_options(options: EditOptions) -> list[str]:
    values = {"selection": options.selection, "keep-mass": options.keep_mass, "factor": options.factor}
    return [*(name for name, value in values.items() if value is not None), *(["per-concept"] * options.per_concept)]


def _entries_step(steps: tuple[StepSpec, ...], wanted: tuple[Method, ...], options: EditOptions) -> StepSpec:
    """The step that selects entries, from the recipe's."""
    base, method = steps[0], wanted[0]
    if base.text is None or base.image is None:
        if selects(method):
            raise InputError(f"the recipe names no layers for method {method.value}", fix="add an [[edit]] with them")
        return StepSpec(method=method)
    specs = with_method(
        EditSpecs(
            text=base.text, image=base.image, method=base.method, per_concept=base.per_concept, towers=base.towers
        ),
        method=method,
        selection=options.selection,
        keep_mass=options.keep_mass,
        factor=options.factor,
        per_concept=options.per_concept,
        chosen_towers=options.towers,
    )
    return StepSpec(
        method=method, per_concept=specs.per_concept, towers=specs.towers, text=specs.text, image=specs.image
    )


def _closed_step(steps: tuple[StepSpec, ...], method: Method, options: EditOptions) -> StepSpec:
    known = steps[-1].axis if steps[-1].method is method else None
    axis = known or AxisSpec()
    if options.placement is not None:
        axis = dataclasses.replace(axis, placement=options.placement)
    if options.max_retrieval_loss is not None:
        if not (math.isfinite(options.max_retrieval_loss) and options.max_retrieval_loss >= 0):
            raise InputError(f"--max-retrieval-loss is {options.max_retrieval_loss}", fix="use points, such as 4")
        axis = dataclasses.replace(axis, max_retrieval_loss=options.max_retrieval_loss)
    if options.axis is not None:
        if options.max_retrieval_loss is not None:
            raise InputError("--axis and --max-retrieval-loss exclude each other", fix="give one of them")
        axis = dataclasses.replace(axis, setting=options.axis)
    if axis.setting is not None:
        require_valid(axis.setting)
    if method is Method.LEACE and (axis.setting is not None or options.max_retrieval_loss is not None):
        raise InputError("method leace has no strength to choose", fix="leave --axis and --max-retrieval-loss out")
    return StepSpec(method=method, axis=axis)


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
    """Edit specs of a recipe with the user's method and settings.

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
