"""What the edited model must be: every step is made again from its sources, and the edit record is checked against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from uwm_deploy.edits.fit_files import read_fit
from uwm_deploy.edits.patch import Patch, flip_bits
from uwm_deploy.edits.proof import ExpectedModel, Parameters, expected_trained, expected_weights, with_closed_form
from uwm_deploy.edits.score_files import selected_entries
from uwm_deploy.edits.solving import limits_of, solved_again
from uwm_deploy.recipes.edit_spec import AxisSpec
from uwm_deploy.recipes.recipe import Recipe
from uwm_deploy.records.edit import ClosedFormRecord, EditKind, EditRecord, LayerScore, Method, ScoreRecord
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.records.training import TrainingRecord
from uwm_deploy.towers.digests import digest_of_tensor
from uwm_deploy.towers.protocol import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeFrom:
    """Sources of an edit.

    Attributes:
        original: The source model.
        score: Record of the scores.
        scores: File of the scores; those of single concepts lie beside it.
        fit: Folder of the sums of a closed-form step.
        before: Loads the model as the step before the closed-form one left it; called only where there is such a step.
        trained: Loads the trained model of the method `trained`; None with another method.
        training: Training record; None where the trained model came without one.
    """

    original: LoadedModel
    score: ScoreRecord
    scores: Path
    fit: Path
    before: Callable[[], LoadedModel]
    trained: Callable[[], LoadedModel] | None = None
    training: TrainingRecord | None = None


def expected_edit(recipe: Recipe, made_from: MadeFrom, edit: EditRecord, patch: Patch) -> ExpectedModel:
    """Makes an edit again.

    Args:
        recipe: The edit that was asked for.
        made_from: Its sources.
        edit: The record to check.
        patch: The patch to check.

    Raises:
        IntegrityError: If scores or sums are not those of the record.
    """
    original, entries = made_from.original.named_parameters(), recipe.entries

    def select(layer: LayerScore) -> Tensor:
        return selected_entries(made_from.score, made_from.scores, layer, entries.of(layer.tower))

    if made_from.trained is not None:
        trained = made_from.trained().named_parameters()
        expected = expected_trained(original, trained, edit, made_from.training)
    else:
        expected = expected_weights(original, made_from.score, edit, patch, entries, select)
    problems, solved, step = list(_not_asked_for(recipe, edit)), {}, edit.closed_form
    if step is not None and step.axis is not None:
        fit = read_fit(made_from.fit)
        axis = dataclasses.replace(step.axis, placement=fit.placement, fitted_on=fit.fitted_on, n_pairs=fit.n_pairs)
        if step != dataclasses.replace(step, method=fit.method, axis=axis):
            problems.append("the edit record tells of another fit than the one it was solved from")
        if step.method is not Method.SAFETY_AXIS or step.axis.setting is not None:
            solved = dict(solved_again(made_from.before(), step, made_from.fit))
    problems += _of_another_source(expected, edit)
    problems += _making_something_else(original, patch)
    expected = dataclasses.replace(expected, problems=(*problems, *expected.problems))
    return with_closed_form(expected, solved, edit)


def _not_asked_for(recipe: Recipe, edit: EditRecord) -> Iterator[str]:
    """Steps and setting of the record that are not the recipe's.

    A closed-form step is solved again with the setting of its record, so the record's setting must be the recipe's.
    """
    if edit.methods != tuple(step.method for step in recipe.edit):
        yield f"the edit record has the steps {edit.method}, where {recipe.method} was asked for"
    spec, step = recipe.closed_form, edit.closed_form
    if spec is not None and step is not None and step.axis is not None and spec.method is Method.SAFETY_AXIS:
        yield from _other_strength(spec.axis, step.axis)


def _other_strength(spec: AxisSpec, axis: ClosedFormRecord) -> Iterator[str]:
    """A strength that is neither the recipe's setting nor the choice under the recipe's limits."""
    wanted, choice = spec.setting, axis.choice
    if wanted is None:
        if choice is None or choice.chosen is None:
            yield "the edit record does not say how its strength was chosen"
            return
        if choice.limits != limits_of(spec):
            yield "the edit record has a strength that was chosen under other limits than were asked for"
        wanted = choice.candidates[choice.chosen].setting
    if axis.setting is None:
        yield "the edit record has no strength"
    elif axis.setting != wanted:
        words = "was chosen" if spec.setting is None else "was asked for"
        yield f"the edit record has another strength than {words}: {_differences(wanted, axis.setting)}"


def _differences(wanted: AxisSetting, found: AxisSetting) -> str:
    left, right = dataclasses.asdict(wanted), dataclasses.asdict(found)
    return ", ".join(f"{name} {right[name]:g} for {left[name]:g}" for name in left if left[name] != right[name])


def _of_another_source(expected: ExpectedModel, edit: EditRecord) -> list[str]:
    """Tensors whose digest before the edit is not the source model's.

    Graphs are searched for unedited weights by these digests, so a wrong one would hide such a weight.
    """
    return [
        f"{tensor.name}: the edit record has another tensor of the source model"
        for tensor in edit.tensors
        if tensor.digest_before != expected.before.get(tensor.name, "")
    ]


@torch.no_grad()
def _making_something_else(original: Parameters, patch: Patch) -> Iterator[str]:
    """Replaced and new tensors for which the patch's bits do not make the tensor of its digest.

    An edit is taken back with these bits, so they are checked here and not only the digests.
    """
    for name, part in patch.tensors.items():
        if part.kind not in (EditKind.REPLACED, EditKind.ADDED):
            continue
        start = original.get(name, torch.zeros(part.bits.shape))
        made = start.detach().clone(memory_format=torch.contiguous_format)
        if made.shape == part.bits.shape:
            flip_bits(made, part.bits)
        if digest_of_tensor(made) != part.digest_after:
            yield f"{name}: the patch makes something else than it promises"
