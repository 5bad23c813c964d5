"""Stage `edit` of weights that were trained for safety: the same record and files as an edit, and no entry is multiplied.

The patch names every layer that differs with the digests of its weight before and after. That is what graphs and engines are
searched for; applying it is refused, because multiplying nothing does not make the weight it promises.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from uwm_deploy.codec import json_from_record
from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.recipe import EditSpecs
from uwm_deploy.records import Digest, EditRecord, LayerEdit, ScoreRecord, TowerName, TrainingRecord
from uwm_deploy.stages.proof import Expected
from uwm_deploy.towers.protocol import LoadedModel
from uwm_deploy.uwm.digests import digest_of_tensor
from uwm_deploy.uwm.patch import LayerPatch, Patch
from uwm_deploy.workspace import digest_of_bytes

_FROM_BASE = "pass --original FOLDER with the weights it was trained from"


def trained_to_folder(
    original: LoadedModel,
    trained: LoadedModel,
    score: ScoreRecord,
    edits: EditSpecs,
    training: TrainingRecord | None,
    folder: Path,
) -> EditRecord:
    """Saves the trained model with the record and the patch file of an edit.

    Args:
        original: The base.
        trained: The model that was made from it.
        score: Of the method `trained`: it names the calibration set, and has no scores.
        edits: Layers that are in the record whether they differ or not.
        training: What is known of the training; None for a model that was trained elsewhere.
        folder: Where the files go.

    Raises:
        InputError: If the two are not of one architecture, or do not prepare their inputs alike.
        IntegrityError: If either is not the one of the training record, or the calibration set is not the training's.
    """
    _check_alike(original, trained)
    if training is not None:
        _check_record(original, trained, score, training)
    layers = [layer for name in (TowerName.TEXT, TowerName.IMAGE) for layer in _layers(original, trained, edits, name)]
    patch = Patch(
        {
            layer.name: LayerPatch(
                indices=torch.empty(0, dtype=torch.int32),
                factor=1.0,
                digest_before=layer.digest_before,
                digest_after=layer.digest_after,
            )
            for layer in layers
        }
    )
    content = patch.to_bytes()
    (folder / "patch.safetensors").write_bytes(content)
    record = EditRecord(
        model=original.ref,
        edited_weights_digest=trained.ref.weights_digest,
        scores_digest=score.scores_digest,
        patch_digest=digest_of_bytes(content),
        layers=tuple(layers),
        method=score.method,
    )
    (folder / "edit.json").write_text(json_from_record(record), encoding="utf-8")
    trained.save(folder / "model")
    return record


def expected_trained(
    original: nn.Module, trained: nn.Module, edit: EditRecord, training: TrainingRecord | None
) -> Expected:
    """What the saved model must be: the trained weights, and the base's wherever the training record names none.

    Args:
        original: The base.
        trained: The trained model, read from where it came from, not from what was saved.
        edit: The record to check.
        training: Names the trained weights with their digests; None takes all of them from `trained`.
    """
    before = {name: digest_of_tensor(p) for name, p in original.named_parameters()}
    after = {name: digest_of_tensor(p) for name, p in trained.named_parameters()}
    weights: dict[str, Digest] = after if training is None else before | dict(training.weights)
    problems = [f"{name}: is not what the training record says" for name in after if after[name] != weights.get(name)]
    recorded = {f"{layer.name}.weight": layer for layer in edit.layers}
    for name, layer in recorded.items():
        if (layer.digest_before, layer.digest_after) != (before.get(name), weights.get(name)):
            problems.append(f"{name}: the edit record has another weight")
    return Expected(weights, len(edit.layers), tuple(problems))


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


def _layers(original: LoadedModel, trained: LoadedModel, edits: EditSpecs, name: TowerName) -> Iterator[LayerEdit]:
    """Linear layers of a tower that differ, and those of the recipe."""
    wanted = set(original.tower(name).layers(edits.of(name).layers))
    for layer, module in original.tower(name).layers(["*"]).items():
        before, after = module.weight.detach(), trained.source.get_parameter(f"{layer}.weight").detach()
        changed = _changed(before, after)
        if changed or layer in wanted:
            yield LayerEdit(
                tower=name,
                name=layer,
                shape=(before.shape[0], before.shape[1]),
                keep_mass=1.0,
                factor=1.0,
                selected=changed,
                share=changed / before.numel(),
                digest_before=digest_of_tensor(before),
                digest_after=digest_of_tensor(after),
            )


def _changed(before: Tensor, after: Tensor) -> int:
    return int((before != after.to(before.device)).sum())
