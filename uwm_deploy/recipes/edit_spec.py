"""The steps of an edit, as a recipe has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from uwm_deploy.errors import RecipeError
from uwm_deploy.records.edit import CLOSED_FORM, Method, Pairing, Rule, Selection, methods_name
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSpec:
    """What is edited in one tower.

    Attributes:
        rule: How scores are formed (method.md section 2).
        layers: Glob patterns over module paths; one that matches nothing is an error.
        keep_mass: Share that is left as it is, between 0 and 1: of each layer's score mass, or of its entries when
            `selection` is hard.
        factor: Multiplier of the selected entries; -1 negates.
        pairing: Mean of ratios (the official code) or ratio of means (the paper's wording); for the method `uwm`.
        selection: By score mass (Eq. 11) or by number of entries.
        gradient_batch: Pairs per gradient, for the gradient baselines; 0 takes the published number.
    """

    rule: Rule
    layers: tuple[str, ...]
    keep_mass: float
    factor: float = -1.0
    pairing: Pairing = Pairing.MEAN_OF_RATIOS
    selection: Selection = Selection.ADAPTIVE
    gradient_batch: int = 0


BOTH_TOWERS = (TowerName.TEXT, TowerName.IMAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSpecs:
    """The step that selects entries, one EditSpec per tower; with the methods that select nothing it is empty-handed.

    Attributes:
        method: The method that the values below are for (docs/background/methods.md).
        per_concept: One score per concept of the set, selections united.
        towers: Those that are scored and edited; the other one goes through the chain as it is.
    """

    text: EditSpec
    image: EditSpec
    method: Method = Method.UWM
    per_concept: bool = False
    towers: tuple[TowerName, ...] = BOTH_TOWERS

    def of(self, tower: TowerName) -> EditSpec:
        """The one of a tower."""
        return self.image if tower is TowerName.IMAGE else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisSpec:
    """How a closed-form step is placed, and how its strength is chosen (docs/background/safety-axis.md).

    Attributes:
        placement: Into the weights, or behind the embedding; `auto` takes the weights where the family can.
        max_retrieval_loss: Most points of safe retrieval (R@1, mean of both directions) that the choice may lose.
        max_hard_safe_loss: Most points of retrieval (R@10) among the safe items that look most unsafe.
        max_zero_shot_loss: Most points of the zero-shot mean.
        setting: Instead of a choice.
    """

    placement: Literal["auto", "weights", "embedding"] = "auto"
    max_retrieval_loss: float = 4.0
    max_hard_safe_loss: float = 8.0
    max_zero_shot_loss: float = 1.0
    setting: AxisSetting | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """One ``[[edit]]`` of a recipe: a step of the edit.

    Attributes:
        method: What the values below are for (docs/background/methods.md).
        per_concept: See `EditSpecs`.
        towers: See `EditSpecs`.
        text: Of a method that selects entries.
        image: Of a method that selects entries.
        axis: Of a closed-form method.
    """

    method: Method = Method.UWM
    per_concept: bool = False
    towers: tuple[TowerName, ...] = BOTH_TOWERS
    text: EditSpec | None = None
    image: EditSpec | None = None
    axis: AxisSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedForm:
    """A closed-form step: method and settings."""

    method: Method
    axis: AxisSpec


def check_steps(methods: Sequence[Method], where: str) -> None:
    """Checks that steps can follow each other.

    Raises:
        RecipeError: If not.
    """
    closed = [method in CLOSED_FORM for method in methods]
    if not methods or len(methods) - sum(closed) > 1 or sum(closed) > 1 or closed[:-1].count(True):
        raise RecipeError(
            f"{where}: the steps {methods_name(methods) or 'are none'}",
            fix="name at most one method that selects weights, then at most one closed-form method, as in uwm+safety-axis",
        )
    if len(methods) > 1 and methods[0] is Method.NONE:
        raise RecipeError(f"{where}: none is no step of an edit with others", fix="leave it out")


def only_embeddings(method: Method) -> str:
    """What a closed-form method does not reach, as the first half of a sentence."""
    return f"method {method.value} changes embeddings only"


def check_step(step: StepSpec, where: str) -> None:
    """Checks one step by itself; `check_steps` is for their order.

    Raises:
        RecipeError: If a key is missing, out of range, or belongs to another kind of method.
    """
    if step.method in (Method.NONE, Method.TRAINED):
        what = "edits nothing" if step.method is Method.NONE else "has no settings"
        raise RecipeError(
            f"{where}.method is {step.method}, which {what}", fix=f"leave it out; use --method {step.method}"
        )
    if not step.towers or len(set(step.towers)) < len(step.towers):
        raise RecipeError(f"{where}.towers is {list(step.towers)}", fix="name image, text or both, once")
    if step.method in CLOSED_FORM:
        _check_closed_form(step, where)
        return
    if step.axis is not None:
        raise RecipeError(f"{where}.axis belongs to a closed-form step", fix="give it an [[edit]] of its own")
    for tower in BOTH_TOWERS:
        edit = step.image if tower is TowerName.IMAGE else step.text
        if edit is None:
            raise RecipeError(f"{where}: missing key {tower.value!r}", fix="see docs/reference/recipes.md")
        _check_entries(edit, f"{where}.{tower.value}")
    assert step.text is not None
    assert step.image is not None
    if step.text.pairing != step.image.pairing:
        raise RecipeError(f"{where}: text and image have different pairings", fix="use one for both")


def _check_closed_form(step: StepSpec, where: str) -> None:
    if step.text or step.image or step.per_concept or set(step.towers) != set(BOTH_TOWERS):
        raise RecipeError(
            f"{where}: method {step.method} selects no entries, and edits both towers",
            fix="leave text, image, per_concept and towers out",
        )
    axis = step.axis or AxisSpec()
    if min(axis.max_retrieval_loss, axis.max_hard_safe_loss, axis.max_zero_shot_loss) < 0:
        raise RecipeError(f"{where}.axis: a limit is negative", fix="use points, such as 4")
    limits = [getattr(axis, f.name) != f.default for f in dataclasses.fields(AxisSpec) if f.name.startswith("max_")]
    if step.method is Method.LEACE and (axis.setting is not None or any(limits)):
        raise RecipeError(f"{where}.axis: leace has no strength", fix="leave setting and the limits out")
    if axis.setting is not None and any(limits):
        raise RecipeError(f"{where}.axis has a setting and limits of a choice", fix="give one of them")


def _check_entries(edit: EditSpec, where: str) -> None:
    if not 0.0 < edit.keep_mass < 1.0:
        raise RecipeError(f"{where}.keep_mass is {edit.keep_mass}", fix="use a share between 0 and 1")
    if not edit.layers:
        raise RecipeError(f"{where}.layers is empty", fix="name at least one layer pattern")
    if edit.rule is Rule.MEAN_ABS_GRADIENT or edit.pairing in (Pairing.UNSAFE_ONLY, Pairing.DIFFERENCE):
        raise RecipeError(
            f"{where} asks for a formula that belongs to a method of its own",
            fix="set edit.method; docs/background/methods.md lists them",
        )
    if edit.gradient_batch < 0:
        raise RecipeError(f"{where}.gradient_batch is {edit.gradient_batch}", fix="use 0 for the published number")
