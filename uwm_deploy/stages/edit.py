"""Stage `edit`: scores to a patch, the patch into the weights, the edited model saved; every promise checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uwm_deploy.codec import json_from_record
from uwm_deploy.errors import ContractError, IntegrityError
from uwm_deploy.recipe import EditSpec, EditSpecs
from uwm_deploy.records import EditRecord, LayerEdit, LayerScore, Method, ScoreRecord, Selection, TowerEdit, TowerName
from uwm_deploy.towers.protocol import LoadedModel
from uwm_deploy.uwm.digests import digest_of_tensor, digest_of_weights
from uwm_deploy.uwm.methods import PRESETS, pairing_of, rule_of, selects
from uwm_deploy.uwm.patch import LayerPatch, Patch, multiply_entries
from uwm_deploy.uwm.selection import selected_indices
from uwm_deploy.workspace import digest_of_bytes, digest_of_file

PATCH, RECORD, MODEL = "patch.safetensors", "edit.json", "model"


def edit_to_folder(
    model: LoadedModel, score: ScoreRecord, scores_file: Path, edits: EditSpecs, folder: Path
) -> EditRecord:
    """Selects, edits in place, and saves patch, record and the edited model as its own library's folder.

    Args:
        model: The source model; it *is* the edited model afterwards.
        score: Record of the scores.
        scores_file: The scores; those of single concepts lie beside it.
        edits: Selection, keep_mass and factor per tower, for the method of the scores.
        folder: Where the files go.

    Raises:
        IntegrityError: If the scores are of another model or method, or were changed.
        ContractError: If anything but the selected entries would change.
    """
    check_scores(model, score, scores_file, edits)
    weights = {layer.name: _weight(model, layer) for layer in score.layers}
    before = {name: digest_of_tensor(p) for name, p in model.source.named_parameters()}
    patch, layers = _patch(score, scores_file, edits, weights)
    patch.apply(weights)
    _check_untouched(model, before, {f"{name}.weight" for name in patch.layers})
    content = patch.to_bytes()
    (folder / PATCH).write_bytes(content)
    record = EditRecord(
        model=score.model,
        edited_weights_digest=digest_of_weights(dict(model.source.named_parameters())),
        scores_digest=score.scores_digest,
        patch_digest=digest_of_bytes(content),
        layers=tuple(layers),
        method=score.method,
        settings={name: _setting(score, name, edits.of(TowerName(name))) for name in score.rules},
        concepts=concepts_of(score),
    )
    (folder / RECORD).write_text(json_from_record(record), encoding="utf-8")
    model.save(folder / MODEL)
    return record


def concepts_of(score: ScoreRecord) -> tuple[str, ...]:
    """Concepts with a score of their own; empty when all pairs make one score."""
    return tuple(dict.fromkeys(part.concept for part in score.parts))


def _weight(model: LoadedModel, layer: LayerScore) -> Tensor:
    return model.source.get_parameter(f"{layer.name}.weight").detach()


def check_scores(model: LoadedModel, score: ScoreRecord, scores_file: Path, edits: EditSpecs) -> None:
    """Checks that scores may be applied: they are of this model and method, and are what their record describes.

    Raises:
        IntegrityError: If they are not. Scores of one method are never applied as another's.
    """
    if score.model.weights_digest != model.ref.weights_digest:
        raise IntegrityError("the scores are of another model", fix="score this model")
    if score.method is not edits.method:
        raise IntegrityError(
            f"the scores are of method {score.method.value}, not {edits.method.value}", fix="score with this method"
        )
    scored = edits.towers if selects(score.method) else ()
    if set(score.rules) != set(scored):
        raise IntegrityError(f"the scores are of the towers {', '.join(score.rules) or 'none'}", fix="score again")
    if bool(score.parts) is not edits.per_concept:
        kind = "one per concept" if score.parts else "of all concepts together"
        raise IntegrityError(f"the scores are {kind}", fix="score again")
    for name, rule in score.rules.items():
        spec = edits.of(TowerName(name))
        if (rule, score.pairing) != (rule_of(edits.method, spec), pairing_of(edits.method, spec)):
            raise IntegrityError(f"the {name} scores are of another formula than the recipe's", fix="score again")
    wanted = [(scores_file, score.scores_digest), *((scores_file.parent / p.file, p.digest) for p in score.parts)]
    for file, digest in wanted:
        if not file.is_file() or digest_of_file(file) != digest:
            raise IntegrityError(f"{file.name} is not the file its record describes", fix="score again")


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
) -> tuple[Patch, list[LayerEdit]]:
    """Selects per layer, one layer's scores in memory at a time."""
    patches, layers = {}, []
    for layer in score.layers:
        spec = edits.of(layer.tower)
        if layer.tower not in score.rules:
            spec = _untouched(spec)
        indices = selected_entries(score, scores_file, layer, spec)
        part, edit = _layer_patch(layer, indices, spec, weights[layer.name])
        patches[layer.name] = part
        layers.append(edit)
    return Patch(patches), layers


def _untouched(spec: EditSpec) -> EditSpec:
    """Nothing is edited, as it stands in records whatever the recipe says."""
    setting = PRESETS[Method.NONE].of(TowerName.IMAGE)
    return dataclasses.replace(spec, keep_mass=setting.keep_mass, factor=setting.factor, selection=setting.selection)


def selected_entries(score: ScoreRecord, scores_file: Path, layer: LayerScore, spec: EditSpec) -> Tensor:
    """Ascending flat indices of the entries of one layer to edit; with one score per concept, the union of theirs.

    None of a tower that was not scored, as with the method `none`: it stays as it is.

    Args:
        score: Record of the scores.
        scores_file: The scores; those of single concepts lie beside it.
        layer: One of the record's layers.
        spec: Selection and keep_mass.

    Raises:
        IntegrityError: If a score file cannot be read.
    """
    if layer.tower not in score.rules:
        return torch.empty(0, dtype=torch.int64)
    parts = [scores_file.parent / part.file for part in score.parts if part.tower is layer.tower]
    signed = PRESETS[score.method].signed and spec.selection is Selection.ADAPTIVE
    chosen = [
        # A negative difference is an entry that safe inputs use more: it has no mass to select.
        selected_indices(scores.clamp_(min=0) if signed else scores, spec.keep_mass, spec.selection)
        for scores in _scores_of(layer.name, parts or [scores_file])
    ]
    return chosen[0] if len(chosen) == 1 else torch.unique(torch.cat(chosen))


def _scores_of(layer: str, files: list[Path]) -> Iterator[Tensor]:
    """Scores of one layer, file by file."""
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as file:
                scores: Tensor = file.get_tensor(layer)
        except SafetensorError as error:
            raise IntegrityError(f"{path.name} cannot be read: {error}", fix="score again") from error
        yield scores


def _layer_patch(layer: LayerScore, indices: Tensor, spec: EditSpec, weight: Tensor) -> tuple[LayerPatch, LayerEdit]:
    edited = weight.clone(memory_format=torch.contiguous_format)
    multiply_entries(edited, indices, spec.factor)
    _check_layer(layer.name, weight, edited, indices, spec.factor)
    kind = torch.int32 if weight.numel() < 2**31 else torch.int64
    digests = (digest_of_tensor(weight), digest_of_tensor(edited))
    patch = LayerPatch(indices=indices.to(kind), factor=spec.factor, digest_before=digests[0], digest_after=digests[1])
    edit = LayerEdit(
        tower=layer.tower,
        name=layer.name,
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


def _check_untouched(model: LoadedModel, before: dict[str, str], edited: set[str]) -> None:
    """Every parameter outside the patch, biases included, has the digest it had."""
    for name, parameter in model.source.named_parameters():
        if name not in edited and digest_of_tensor(parameter) != before[name]:
            raise ContractError(f"{name} changed although it is not edited", fix="report this")
