"""Puts the entries that a method selects into a model, layer by layer, with every promise checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from uwm_deploy.edits.methods import PRESETS
from uwm_deploy.edits.patch import Patch, TensorPatch, multiply_entries
from uwm_deploy.edits.score_files import check_scores, concepts_of, parameter_of, selected_entries
from uwm_deploy.errors import ContractError
from uwm_deploy.recipes.edit_spec import EditSpec, EditSpecs
from uwm_deploy.records.edit import (
    EditKind,
    EditStep,
    LayerScore,
    Method,
    ScoreRecord,
    TensorEdit,
    TowerEdit,
)
from uwm_deploy.records.model import TowerName
from uwm_deploy.towers.digests import digest_of_tensor
from uwm_deploy.towers.protocol import LoadedModel


def select_and_apply(
    model: LoadedModel, score: ScoreRecord, scores_file: Path, edits: EditSpecs
) -> tuple[Patch, dict[str, TensorEdit]]:
    """Makes the step that selects entries, in place; see `edit_to_folder`.

    Returns:
        Its patch, and what it did to each tensor, by name.
    """
    check_scores(model, score, scores_file, edits)
    weights = {parameter_of(layer): _weight(model, layer) for layer in score.layers}
    patch, tensors = _patch(score, scores_file, edits, weights)
    patch.apply(weights)
    return patch, tensors


def step_of(score: ScoreRecord, edits: EditSpecs) -> EditStep:
    """The record of a step that selects entries."""
    return EditStep(
        method=score.method,
        settings={name: _setting(score, name, edits.of(TowerName(name))) for name in score.rules},
        concepts=concepts_of(score),
        scores_digest=score.scores_digest,
    )


def tensor_edit(name: str, tower: TowerName | None, before: Tensor | None, after: Tensor) -> TensorEdit:
    """What was done to a tensor whose values were replaced.

    Args:
        name: Of the tensor.
        tower: Whose graph holds it.
        before: Values before the edit, float32, any shape; None for a new tensor.
        after: Values after the edit, float32, any shape (that of `before`).
    """
    differ = after.numel() if before is None else int((before != after).sum())
    return TensorEdit(
        tower=tower,
        name=name,
        shape=tuple(after.shape),
        selected=differ,
        share=differ / after.numel(),
        digest_before="" if before is None else digest_of_tensor(before),
        digest_after=digest_of_tensor(after),
        kind=EditKind.ADDED if before is None else EditKind.REPLACED,
    )


def _weight(model: LoadedModel, layer: LayerScore) -> Tensor:
    return model.source.get_parameter(parameter_of(layer)).detach()


def _setting(score: ScoreRecord, tower: str, spec: EditSpec) -> TowerEdit:
    return TowerEdit(
        rule=score.rules[tower],
        pairing=score.pairing,
        selection=spec.selection,
        keep_mass=spec.keep_mass,
        factor=spec.factor,
        gradient_batch=score.gradient_batch.get(tower, 0),
    )


@torch.no_grad()
def _patch(
    score: ScoreRecord, scores_file: Path, edits: EditSpecs, weights: dict[str, Tensor]
) -> tuple[Patch, dict[str, TensorEdit]]:
    """Selects per layer, one layer's scores in memory at a time."""
    parts, tensors = {}, {}
    for layer in score.layers:
        spec = edits.of(layer.tower)
        if layer.tower not in score.rules:
            spec = _untouched(spec)
        indices = selected_entries(score, scores_file, layer, spec)
        name = parameter_of(layer)
        parts[name], tensors[name] = _layer_patch(layer, indices, spec, weights[name])
    return Patch(parts), tensors


def _untouched(spec: EditSpec) -> EditSpec:
    """Nothing is edited, as it stands in records whatever the recipe says."""
    setting = PRESETS[Method.NONE].of(TowerName.IMAGE)
    return dataclasses.replace(spec, keep_mass=setting.keep_mass, factor=setting.factor, selection=setting.selection)


def _layer_patch(layer: LayerScore, indices: Tensor, spec: EditSpec, weight: Tensor) -> tuple[TensorPatch, TensorEdit]:
    edited = weight.clone(memory_format=torch.contiguous_format)
    multiply_entries(edited, indices, spec.factor)
    _check_layer(layer.name, weight, edited, indices, spec.factor)
    kind = torch.int32 if weight.numel() < 2**31 else torch.int64
    digests = (digest_of_tensor(weight), digest_of_tensor(edited))
    patch = TensorPatch(indices=indices.to(kind), factor=spec.factor, digest_before=digests[0], digest_after=digests[1])
    edit = TensorEdit(
        tower=layer.tower,
        name=parameter_of(layer),
        shape=layer.shape,
        keep_mass=spec.keep_mass,
        factor=spec.factor,
        selected=len(indices),
        share=len(indices) / weight.numel(),
        digest_before=digests[0],
        digest_after=digests[1],
        selection=spec.selection,
    )
    return patch, edit


def _check_layer(name: str, before: Tensor, after: Tensor, indices: Tensor, factor: float) -> None:
    """Only selected entries differ; with factor -1 the absolute values are bit-equal."""
    changed = (before != after).flatten().nonzero().flatten().cpu()
    if not bool(torch.isin(changed, indices).all()):
        raise ContractError(f"{name}: an entry changed that was not selected", fix="report this")
    if factor == -1.0 and not torch.equal(before.abs(), after.abs()):
        raise ContractError(f"{name}: absolute values changed", fix="report this")
