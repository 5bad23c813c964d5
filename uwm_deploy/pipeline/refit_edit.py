"""The new edit of a refit: a patch, a new selection, another strength, or none; and what it changes in the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from uwm_deploy.edits.applied import tensor_edit
from uwm_deploy.edits.closed_form import last_tensors, put
from uwm_deploy.edits.fit_files import read_fit
from uwm_deploy.edits.methods import selects
from uwm_deploy.edits.patch import Patch, replaced
from uwm_deploy.edits.solving import solver
from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.graphs.stored_weights import Replacement
from uwm_deploy.pipeline.refit_graphs import (
    Swap,
    held_tensors,
    reverted,
    without_edit,
)
from uwm_deploy.pipeline.refitting import Refitting
from uwm_deploy.recipes.edit_spec import AxisSpec, ClosedForm, EditSpecs
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import EditKind, EditRecord, Method, ScoreRecord
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import TowerName
from uwm_deploy.stages.edit.edit import PATCH, RECORD, edit_to_folder, saved_edit
from uwm_deploy.towers.digests import digest_of_weights
from uwm_deploy.towers.embedding_map import put_maps
from uwm_deploy.towers.protocol import LoadedModel

_TRAINED = "the weights were trained, so no patch makes them or takes them back"


class SameEditError(InputError):
    """The new edit is the one that is there."""


def swap_of(job: Refitting, model: LoadedModel | None) -> Swap:
    """Old and new edit; the model is the edited one afterwards."""
    if Method.TRAINED in job.edit.methods:
        raise InputError(_TRAINED, fix="build the other model")
    if job.request.revert:
        record, patch = reverted(job.edit, job.patch)
        content = patch.to_bytes()
    elif job.request.patch is not None:
        record, patch, content = _edit_at(job.request.patch)
    else:
        assert model is not None
        record, patch, content = _edit_at(_solved(job, model) if job.restrengthened else _selected(job, model))
    _check_new(job, record)
    held = _held(job, record)
    if model is None:
        after = without_edit(held, job.edit, job.patch)
    else:
        if job.request.patch is not None:
            _apply(patch, record, model)
        parameters = model.named_parameters()
        if digest_of_weights(parameters) != record.edited_weights_digest:
            raise IntegrityError("the patch does not make the weights its record promises", fix="edit again")
        after = {name: parameters[name].detach().cpu().numpy() for name in held}
    changes = {name: Replacement(held[name], after[name]) for name in held}
    return Swap(old=job.edit, old_patch=job.patch, new=record, new_patch=patch, content=content, changes=changes)


def _check_new(job: Refitting, record: EditRecord) -> None:
    if Method.TRAINED in record.methods:
        raise InputError(_TRAINED, fix="build the other model")
    if record.model.weights_digest != job.manifest.model.weights_digest:
        raise IntegrityError("the patch is of another model", fix="pass a patch of the bundle's source model")
    if record.edited_weights_digest == job.edit.edited_weights_digest:
        raise SameEditError("the bundle holds this edit already", fix="pass another one")
    added = [{t.name for t in edit.tensors if t.kind is EditKind.ADDED} for edit in (job.edit, record)]
    if added[0] != added[1]:
        raise InputError("one of the two edits has maps behind the embeddings, which are nodes", fix="build again")


def _held(job: Refitting, record: EditRecord) -> dict[str, np.ndarray]:
    """Every tensor that either edit names, as the bundle's graphs hold it."""
    digests = {t.name: t.digest_before for t in record.tensors} | {t.name: t.digest_after for t in job.edit.tensors}
    towers = {t.name: t.tower for edit in (job.edit, record) for t in edit.tensors}
    wanted = {name: digest for name, digest in digests.items() if towers[name] is not None}
    return held_tensors(job.manifest.onnx, job.old / "onnx", wanted)


def _solved(job: Refitting, model: LoadedModel) -> Path:
    """Folder with the edit of another strength, from the fit that the bundle's edit was solved from."""
    step = job.edit.closed_form
    if step is None or step.axis is None or step.method is not Method.SAFETY_AXIS:
        raise InputError(
            "the bundle's edit has no safety axis whose strength could change",
            fix="put one in with --patch and a bundle or run folder that has it",
        )
    folder = job.work.fit
    fit = read_fit(folder)
    if fit.sums_digest != step.scores_digest:
        raise IntegrityError(
            "the run folder's fit is not the bundle's", fix="pass --work with its run folder, or build again"
        )
    recipe = job.recipe
    known = recipe.closed_form.axis if recipe.closed_form else AxisSpec()
    axis = dataclasses.replace(known, setting=job.request.axis)
    if job.request.max_retrieval_loss is not None:
        axis = dataclasses.replace(axis, max_retrieval_loss=job.request.max_retrieval_loss)
    solve = solver(ClosedForm(method=step.method, axis=axis), fit, folder, job.reporter.line)
    first = {n: p for n, p in job.patch.tensors.items() if p.kind is EditKind.MULTIPLIED}
    before = {name: p.detach().clone() for name, p in last_tensors(model).items()}
    if set(first) & set(before):
        raise InputError("the step before edits the last map, too", fix="build again")
    Patch(first).apply({name: model.named_parameters()[name].detach() for name in first})
    solved = solve(model)
    put(model, solved)
    tensors = {t.name: t for t in job.edit.tensors if t.name in first}
    parts = dict(first)
    for name, after in solved.tensors.items():
        parts[name] = replaced(before.get(name), after)
        tensors[name] = tensor_edit(name, solved.towers[name], before.get(name), after)
    out = job.folder / "edit"
    out.mkdir()
    steps = (*(s for s in job.edit.steps if s.axis is None), solved.step)
    saved_edit(model, job.edit.model, Patch(parts), tensors.values(), steps, out)
    return out


def _selected(job: Refitting, model: LoadedModel) -> Path:
    """Folder with the edit of another keep_mass, from the scores that the bundle's edit was selected from."""
    step = job.edit.first
    if not selects(step.method):
        raise InputError("the bundle holds no edit whose keep_mass could change", fix="use --patch")
    if job.edit.closed_form is not None:
        raise InputError("the closed-form step was fitted on this keep_mass", fix="build again with the other one")
    keep_mass = job.request.keep_mass
    assert keep_mass is not None
    file = job.work.score_record
    if not file.is_file():
        raise InputError(f"{job.work.root} holds no scores", fix="pass --work with the bundle's run folder")
    score = read_record(ScoreRecord, file)
    if score.scores_digest != step.scores_digest:
        raise IntegrityError("the run folder's scores are not the bundle's", fix="pass --work with its run folder")
    entries = job.recipe.entries
    specs = {
        tower: dataclasses.replace(
            entries.of(tower),
            rule=setting.rule,
            pairing=setting.pairing or entries.of(tower).pairing,
            selection=setting.selection,
            keep_mass=keep_mass,
            factor=setting.factor,
            gradient_batch=setting.gradient_batch,
        )
        for tower in TowerName
        if (setting := step.settings.get(tower.value))
    }
    edits = EditSpecs(
        text=specs.get(TowerName.TEXT, entries.text),
        image=specs.get(TowerName.IMAGE, entries.image),
        method=step.method,
        per_concept=bool(step.concepts),
        towers=tuple(specs),
    )
    folder = job.folder / "edit"
    folder.mkdir()
    edit_to_folder(model, score, job.work.scores, edits, folder)
    return folder


def _edit_at(path: Path) -> tuple[EditRecord, Patch, bytes]:
    """Record, patch and content of a patch file: a patch file, or a bundle, run folder or edit folder that has one.

    Raises:
        InputError: If one of the two is missing or broken.
        IntegrityError: If they do not belong together.
    """
    candidates = [path] if path.is_file() else [path / PATCH, path / "edit" / PATCH]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise InputError(f"{path} holds no {PATCH}", fix="pass the patch of a bundle or of a run folder")
    content = file.read_bytes()  # once: what is checked is what is used
    patch = Patch.from_bytes(content, file.name)
    records = [file.with_name(RECORD), file.parent / "reports" / RECORD]
    found = next((candidate for candidate in records if candidate.is_file()), None)
    if found is None:
        raise InputError(f"{file.name} has no {RECORD} beside it", fix="pass the folder that `edit` wrote, or a bundle")
    record = read_record(EditRecord, found)
    promised = {t.name: (t.kind, t.digest_before, t.digest_after) for t in record.tensors}
    if promised != {name: (part.kind, part.digest_before, part.digest_after) for name, part in patch.tensors.items()}:
        raise IntegrityError(f"{file.name} is not the patch that {found.name} describes", fix="edit again")
    if digest_of_bytes(content) != record.patch_digest:
        raise IntegrityError(f"{file.name} is not the patch that {found.name} describes", fix="edit again")
    return record, patch, content


def _apply(patch: Patch, record: EditRecord, model: LoadedModel) -> None:
    """Applies the patch of a record to the source model, maps behind the embeddings included."""
    new = {t.name: torch.zeros(t.shape) for t in record.tensors if t.kind is EditKind.ADDED}
    parameters = {name: p.detach() for name, p in model.named_parameters().items()} | new
    patch.apply({name: parameters[name] for name in patch.tensors})
    if new:
        put_maps(model, new)
