"""Stage `edit`: scores to a patch, the patch into the weights, the edited model saved; every promise checked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from uwm_deploy.edits.applied import select_and_apply, step_of, tensor_edit
from uwm_deploy.edits.closed_form import Solve, last_tensors, put
from uwm_deploy.edits.patch import Patch, replaced
from uwm_deploy.errors import ContractError
from uwm_deploy.recipes.edit_spec import EditSpecs
from uwm_deploy.records.codec import write_record
from uwm_deploy.records.edit import (
    CLOSED_FORM,
    EditRecord,
    EditStep,
    ScoreRecord,
    TensorEdit,
)
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import ModelRef
from uwm_deploy.towers.digests import digest_of_tensor, digest_of_weights
from uwm_deploy.towers.embedding_map import save_maps
from uwm_deploy.towers.protocol import MAPS, LoadedModel

PATCH, RECORD, MODEL = "patch.safetensors", "edit.json", "model"


def edit_to_folder(
    model: LoadedModel,
    score: ScoreRecord,
    scores_file: Path,
    edits: EditSpecs,
    folder: Path,
    closed_form: Solve | None = None,
) -> EditRecord:
    """Selects, edits in place, and saves patch, record and the edited model as its own library's folder.

    Args:
        model: The source model; it *is* the edited model afterwards.
        score: Record of the scores.
        scores_file: The scores; those of single concepts lie beside it.
        edits: Selection, keep_mass and factor per tower, for the method of the scores.
        folder: Where the files go.
        closed_form: Solves the closed-form step for the model as the step before left it; None without one.

    Raises:
        IntegrityError: If the scores are of another model or method, or were changed.
        ContractError: If anything but the selected entries would change.
    """
    before = {name: p.detach().clone() for name, p in last_tensors(model).items()} if closed_form else {}
    digests = {name: digest_of_tensor(p) for name, p in model.named_parameters().items()}
    patch, tensors = select_and_apply(model, score, scores_file, edits)
    steps = [] if edits.method in CLOSED_FORM else [step_of(score, edits)]
    parts = dict(patch.tensors)
    if closed_form is not None:
        solved = closed_form(model)
        put(model, solved)
        steps.append(solved.step)
        for name, after in solved.tensors.items():
            parts[name] = replaced(before.get(name), after)
            tensors[name] = tensor_edit(name, solved.towers[name], before.get(name), after)
    _check_untouched(model, digests, set(parts))
    return saved_edit(model, score.model, Patch(parts), tensors.values(), steps, folder)


def saved_edit(
    model: LoadedModel,
    source: ModelRef,
    patch: Patch,
    tensors: Iterable[TensorEdit],
    steps: Iterable[EditStep],
    folder: Path,
) -> EditRecord:
    """Saves an edited model with its patch and its record.

    Args:
        model: The edited model.
        source: What it was made from.
        patch: Every tensor that changed.
        tensors: What was done to each.
        steps: In their order.
        folder: Where the files go.
    """
    content = patch.to_bytes()
    (folder / PATCH).write_bytes(content)
    record = EditRecord(
        model=source,
        edited_weights_digest=digest_of_weights(model.named_parameters()),
        patch_digest=digest_of_bytes(content),
        tensors=tuple(tensors),
        steps=tuple(steps),
    )
    write_record(folder / RECORD, record)
    model.save(folder / MODEL)
    if model.maps:
        save_maps(model, folder / MODEL / MAPS)
    return record


def _check_untouched(model: LoadedModel, before: dict[str, str], edited: set[str]) -> None:
    """Every parameter outside the patch, biases included, has the digest it had."""
    for name, parameter in model.source.named_parameters():
        if name not in edited and digest_of_tensor(parameter) != before[name]:
            raise ContractError(f"{name} changed although it is not edited", fix="report this")
