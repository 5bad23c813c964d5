"""Proof that the saved edited model is the source with every step of the edit made once, and nothing else.

The edit stage checks the model in its memory. This module checks the model that was saved and is exported. It trusts neither
the patch nor the edit record: entries are selected again from the scores, and a closed-form step is solved again from its
sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from uwm_deploy.edits.patch import Patch, multiply_entries
from uwm_deploy.recipes.edit_spec import EditSpecs
from uwm_deploy.records.edit import EditKind, EditRecord, LayerScore, ScoreRecord
from uwm_deploy.records.evidence import EditProof
from uwm_deploy.records.model import Digest
from uwm_deploy.records.training import TrainingRecord
from uwm_deploy.towers.digests import digest_of_tensor

_NAMED = 20
"""Largest number of problems that are listed."""

SOLVED_AGAIN = 1e-5
"""Tolerance for a tensor that is solved again, relative to its largest entry: solvers differ in the last digits."""

Parameters = Mapping[str, Tensor]
"""Parameters of a model by name, float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedModel:
    """Weights that the edited model must have.

    Attributes:
        before: Parameter of the source model to its digest.
        weights: Parameter to the digest that it must have.
        promised: Parameter to the digest that record and patch promise.
        problems: Contradictions of record and patch, found without the edited model.
        solved: Parameter to the values that it must have within `SOLVED_AGAIN`, float32 on the CPU, any shape (the
            parameter's own).
    """

    before: Mapping[str, Digest]
    weights: Mapping[str, Digest]
    promised: Mapping[str, Digest]
    problems: tuple[str, ...]
    solved: Mapping[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def expected_weights(
    original: Parameters,
    score: ScoreRecord,
    edit: EditRecord,
    patch: Patch,
    edits: EditSpecs,
    select: Callable[[LayerScore], Tensor],
) -> ExpectedModel:
    """Makes the step that selects entries again, layer by layer, without touching the model.

    Args:
        original: The source model's parameters, float32, any shape.
        score: Record of the scores; its layers are the ones to edit.
        edit: The record to check.
        patch: The patch to check.
        edits: Factor per tower.
        select: Gives the flat indices (k,) int32 or int64 that the scores of a layer select.
    """
    before = {name: digest_of_tensor(parameter) for name, parameter in original.items()}
    weights: dict[str, Digest] = {}
    multiplied = {name for name, part in patch.tensors.items() if part.kind is EditKind.MULTIPLIED}
    scored = {f"{layer.name}.weight" for layer in score.layers}
    problems = [f"{name}: is in the patch, and was not scored" for name in sorted(multiplied - scored)]
    problems += _disagreements(edit, patch)
    recorded = {tensor.name: tensor for tensor in edit.tensors}
    for layer in score.layers:
        name = f"{layer.name}.weight"
        indices = select(layer)
        factor = edits.of(layer.tower).factor if layer.tower in score.rules else 1.0
        edited = original[name].detach().clone(memory_format=torch.contiguous_format)
        multiply_entries(edited, indices, factor)
        weights[name] = digest_of_tensor(edited)
        if name not in recorded or name not in patch.tensors:
            problems.append(f"{name}: was scored, and is not edited")
            continue
        part = patch.tensors[name]
        if part.kind is not EditKind.MULTIPLIED:  # a later step replaced it
            continue
        if not torch.equal(part.indices.long().cpu(), indices.long().cpu()):
            problems.append(f"{name}: the patch edits other entries than the scores select")
        if layer.tower in score.rules and (part.factor != factor or recorded[name].factor != factor):
            problems.append(f"{name}: the patch has factor {part.factor:g}, the recipe {factor:g}")
    return ExpectedModel(before=before, weights=before | weights, promised=promised_by(edit), problems=tuple(problems))


def _disagreements(edit: EditRecord, patch: Patch) -> list[str]:
    """Tensors on which record and patch disagree."""
    recorded = {t.name: (t.kind, t.digest_before, t.digest_after) for t in edit.tensors}
    held = {name: (p.kind, p.digest_before, p.digest_after) for name, p in patch.tensors.items()}
    differ = sorted(name for name in recorded.keys() | held if recorded.get(name) != held.get(name))
    return [f"{name}: the edit record and the patch disagree" for name in differ]


def promised_by(edit: EditRecord) -> dict[str, Digest]:
    """Tensor to the digest that a record promises."""
    return {tensor.name: tensor.digest_after for tensor in edit.tensors}


def with_closed_form(expected: ExpectedModel, solved: Mapping[str, Tensor], edit: EditRecord) -> ExpectedModel:
    """Adds a closed-form step.

    Args:
        expected: After the steps before.
        solved: The step's tensors, float32 of any shape, solved again from the sums of its fit.
        edit: The record to check.
    """
    recorded = {t.name for t in edit.tensors if t.kind in (EditKind.REPLACED, EditKind.ADDED)}
    problems = [f"{name}: is in the edit record, and no step replaces it" for name in sorted(recorded - set(solved))]
    problems += [f"{name}: is replaced, and the edit record does not say so" for name in sorted(set(solved) - recorded)]
    return dataclasses.replace(
        expected,
        weights={name: digest for name, digest in expected.weights.items() if name not in solved},
        solved=dict(solved),
        problems=(*expected.problems, *problems),
    )


@torch.no_grad()
def proof_of(expected: ExpectedModel, edited: Parameters) -> EditProof:
    """Compares the edited model with what it must be, tensor by tensor.

    Args:
        expected: Of the same recipe.
        edited: Parameters of the saved model as they were read back, float32, any shape.
    """
    problems = list(expected.problems)
    for name, parameter in edited.items():
        digest = digest_of_tensor(parameter)
        if name in expected.solved:
            problems += _differences(name, expected.solved[name], parameter)
        elif name not in expected.weights:
            problems.append(f"{name}: the source model has no such weight")
        elif digest != expected.weights[name]:
            problems.append(f"{name}: is not the source's weight with the edit made once")
        if name not in expected.promised and digest != expected.before.get(name):
            problems.append(f"{name}: was changed, and is not in the edit record")
        elif name in expected.promised and digest != expected.promised[name]:
            problems.append(f"{name}: is not what the edit record promises")
    wanted = set(expected.weights) | set(expected.solved)
    problems += [f"{name}: is missing" for name in sorted(wanted - set(edited))]
    unique = tuple(dict.fromkeys(problems))
    return EditProof(layers=len(expected.promised), weights=len(wanted), problems=unique[:_NAMED])


def _differences(name: str, wanted: Tensor, found: Tensor) -> list[str]:
    here = found.detach().cpu()
    if here.shape != wanted.shape:
        return [f"{name}: has shape {tuple(here.shape)}, solved again {tuple(wanted.shape)}"]
    largest, scale = float((here - wanted).abs().max()), float(wanted.abs().max())
    if largest <= SOLVED_AGAIN * scale:
        return []
    return [f"{name}: differs by {largest / max(scale, 1e-30):.2g} of its largest entry from what its fit gives"]


def expected_trained(
    original: Parameters, trained: Parameters, edit: EditRecord, training: TrainingRecord | None
) -> ExpectedModel:
    """Weights that the saved model must have: the trained ones, and the base's wherever the training record names none.

    Args:
        original: Parameters of the base model, float32, any shape.
        trained: Parameters of the trained model, float32, any shape, read from its source and not from what was saved.
        edit: The record to check.
        training: Names the trained weights with their digests; None takes all of them from `trained`.
    """
    before = {name: digest_of_tensor(p) for name, p in original.items()}
    after = {name: digest_of_tensor(p) for name, p in trained.items()}
    weights: dict[str, Digest] = after if training is None else before | dict(training.weights)
    problems = [f"{name}: is not what the training record says" for name in after if after[name] != weights.get(name)]
    for tensor in edit.tensors:
        found = (before.get(tensor.name), weights.get(tensor.name))
        if tensor.kind is EditKind.TRAINED and (tensor.digest_before, tensor.digest_after) != found:
            problems.append(f"{tensor.name}: the edit record has another weight")
    return ExpectedModel(before=before, weights=weights, promised=promised_by(edit), problems=tuple(problems))
