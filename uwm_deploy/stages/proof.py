"""Is the saved edited model the source with the selected entries multiplied, once, and nothing else?

The edit stage promises it of what is in its memory; this looks at what was saved and is exported, and trusts neither the
patch nor the record: the selection is made again from the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uwm_deploy.recipe import EditSpecs
from uwm_deploy.records import Digest, EditProof, EditRecord, LayerScore, ScoreRecord
from uwm_deploy.uwm.digests import digest_of_tensor
from uwm_deploy.uwm.patch import Patch, multiply_entries

_NAMED = 20
"""Problems that are listed."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the edited model must be.

    Attributes:
        weights: Parameter to the digest that it must have.
        layers: Number of edited layers.
        problems: What is wrong with record and patch already.
    """

    weights: Mapping[str, Digest]
    layers: int
    problems: tuple[str, ...]


@torch.no_grad()
def expected_weights(
    original: nn.Module,
    score: ScoreRecord,
    edit: EditRecord,
    patch: Patch,
    edits: EditSpecs,
    select: Callable[[LayerScore], Tensor],
) -> Expected:
    """Makes the edit again, layer by layer, without touching the model.

    Args:
        original: The source model.
        score: What was scored: its layers are the ones to edit.
        edit: The record to check.
        patch: The patch to check.
        edits: Factor per tower.
        select: Flat indices that the scores of a layer select.
    """
    weights: dict[str, Digest] = {}
    problems = [f"{name}: is in the patch, and was not scored" for name in _beyond(patch, score)]
    recorded = {layer.name: layer for layer in edit.layers}
    for layer in score.layers:
        name = f"{layer.name}.weight"
        indices = select(layer)
        factor = edits.of(layer.tower).factor if layer.tower in score.rules else 1.0
        edited = original.get_parameter(name).detach().clone(memory_format=torch.contiguous_format)
        multiply_entries(edited, indices, factor)
        weights[name] = digest_of_tensor(edited)
        if layer.name not in recorded or layer.name not in patch.layers:
            problems.append(f"{layer.name}: was scored, and is not edited")
            continue
        part = patch.layers[layer.name]
        if not torch.equal(part.indices.long().cpu(), indices.long().cpu()):
            problems.append(f"{layer.name}: the patch edits other entries than the scores select")
        if layer.tower in score.rules and (part.factor != factor or recorded[layer.name].factor != factor):
            problems.append(f"{layer.name}: the patch has factor {part.factor:g}, the recipe {factor:g}")
    for name, parameter in original.named_parameters():
        if name not in weights:
            weights[name] = digest_of_tensor(parameter)
    return Expected(weights, len(score.layers), tuple(problems))


def _beyond(patch: Patch, score: ScoreRecord) -> list[str]:
    return sorted(set(patch.layers) - {layer.name for layer in score.layers})


@torch.no_grad()
def proof_of(expected: Expected, edited: nn.Module) -> EditProof:
    """Compares the edited model with what it must be, weight by weight.

    Args:
        expected: Of the same recipe.
        edited: The model as it was read back from the saved folder.
    """
    problems, found = list(expected.problems), set()
    for name, parameter in edited.named_parameters():
        found.add(name)
        if name not in expected.weights:
            problems.append(f"{name}: the source model has no such weight")
        elif digest_of_tensor(parameter) != expected.weights[name]:
            problems.append(f"{name}: is not the source's weight with the edit made once")
    problems += [f"{name}: is missing" for name in sorted(set(expected.weights) - found)]
    return EditProof(layers=expected.layers, weights=len(expected.weights), problems=tuple(problems[:_NAMED]))
