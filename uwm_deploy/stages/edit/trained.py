"""Stage `edit` of weights that were trained for safety: the same record and files as an edit, and no entry is multiplied.

The patch names every tensor that differs, biases and normalisations included, with its digests before and after. That is
what graphs and engines are searched for; applying it is refused, because it does not hold the values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from uwm_deploy.edits.applied import tensor_edit
from uwm_deploy.edits.closed_form import Solve, put
from uwm_deploy.edits.patch import Patch, TensorPatch, replaced
from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.recipes.edit_spec import EditSpecs
from uwm_deploy.records.edit import EditKind, EditRecord, EditStep, Method, ScoreRecord, TensorEdit
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.training import TrainingRecord
from uwm_deploy.stages.edit.edit import saved_edit
from uwm_deploy.towers.protocol import LoadedModel

_FROM_BASE = "pass --original FOLDER with the weights it was trained from"


def trained_to_folder(
    original: LoadedModel,
    trained: LoadedModel,
    score: ScoreRecord,
    edits: EditSpecs,
    training: TrainingRecord | None,
    folder: Path,
    closed_form: Solve | None = None,
) -> EditRecord:
    """Saves the trained model with the record and the patch file of an edit.

    Args:
        original: The base.
        trained: The model that was made from it.
        score: Of the method `trained`: it names the calibration set, and has no scores.
        edits: Layers that are in the record whether they differ or not.
        training: What is known of the training; None for a model that was trained elsewhere.
        folder: Where the files go.
        closed_form: Solves the step on top of the trained weights; None without one.

    Raises:
        InputError: If the two are not of one architecture, or do not prepare their inputs alike.
        IntegrityError: If either is not the one of the training record, or the calibration set is not the training's.
    """
    _check_alike(original, trained)
    if training is not None:
        _check_record(original, trained, score, training)
    tensors = list(_tensors(original, trained, edits))
    parts = {t.name: _listed(t) for t in tensors}
    steps = [EditStep(method=Method.TRAINED, scores_digest=score.scores_digest)]
    if closed_form is not None:
        solved = closed_form(trained)
        put(trained, solved)
        steps.append(solved.step)
        for name, after in solved.tensors.items():
            before = _parameter(original, name)
            parts[name] = replaced(before, after)
            tensors = [t for t in tensors if t.name != name]
            tensors.append(tensor_edit(name, solved.towers[name], before, after))
    return saved_edit(trained, original.ref, Patch(parts), tensors, steps, folder)


def _parameter(model: LoadedModel, name: str) -> Tensor | None:
    parameter = model.named_parameters().get(name)
    return None if parameter is None else parameter.detach()


def _listed(tensor: TensorEdit) -> TensorPatch:
    return TensorPatch(kind=EditKind.TRAINED, digest_before=tensor.digest_before, digest_after=tensor.digest_after)


def _check_alike(original: LoadedModel, trained: LoadedModel) -> None:
    shapes = [{name: tuple(p.shape) for name, p in m.source.named_parameters()} for m in (original, trained)]
    if shapes[0] != shapes[1]:
        name = min(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
        raise InputError(f"the trained model and its base differ in the shape of {name}", fix=_FROM_BASE)
    for what, left, right in (
        ("image preprocessing", original.ref.image, trained.ref.image),
        ("tokenisation", original.ref.text, trained.ref.text),
    ):
        if left != right:
            raise InputError(f"the trained model and its base differ in {what}", fix=_FROM_BASE)


def _check_record(original: LoadedModel, trained: LoadedModel, score: ScoreRecord, training: TrainingRecord) -> None:
    if original.ref.weights_digest != training.base.weights_digest:
        raise IntegrityError("the original is not the model that was trained", fix=_FROM_BASE)
    if trained.ref.weights_digest != training.trained_weights_digest:
        raise IntegrityError("the trained weights are not those of their training record", fix="train again")
    found, wanted = score.calibration, training.calibration
    if (found.ids_digest, found.content_digest) != (wanted.ids_digest, wanted.content_digest):
        raise IntegrityError(
            f"the calibration set {found.name} is not the {wanted.n} quadruples that the model was trained on",
            fix="pass the set of the training by --calibration",
        )


def _tensors(original: LoadedModel, trained: LoadedModel, edits: EditSpecs) -> Iterator[TensorEdit]:
    """Parameters that differ, and the weights of the recipe's layers, whether they differ or not."""
    towers = {
        name: tower for tower in (TowerName.TEXT, TowerName.IMAGE)
        for name, _ in original.tower(tower).graph_module().named_parameters()
    }  # fmt: skip
    wanted = {
        f"{layer}.weight" for tower in TowerName for layer in original.tower(tower).layers(edits.of(tower).layers)
    }
    for name, parameter in original.source.named_parameters():
        before, after = parameter.detach(), trained.source.get_parameter(name).detach().to(parameter.device)
        if name in wanted or not torch.equal(before, after):
            yield dataclasses.replace(tensor_edit(name, towers.get(name), before, after), kind=EditKind.TRAINED)
