"""Entries that an edit selects, from the files of a scoring pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from uwm_deploy.edits.methods import PRESETS, pairing_of, rule_of, selects
from uwm_deploy.edits.selection import selected_indices
from uwm_deploy.errors import IntegrityError
from uwm_deploy.recipes.edit_spec import EditSpec, EditSpecs
from uwm_deploy.records.edit import (
    LayerScore,
    ScoreRecord,
    Selection,
)
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.tensor_file import open_tensors
from uwm_deploy.towers.protocol import LoadedModel


def concepts_of(score: ScoreRecord) -> tuple[str, ...]:
    """Concepts with a score of their own; empty when all pairs make one score."""
    return tuple(dict.fromkeys(part.concept for part in score.parts))


def parameter_of(layer: LayerScore) -> str:
    """Name of the weight of a scored layer."""
    return f"{layer.name}.weight"


def check_scores(model: LoadedModel, score: ScoreRecord, scores_file: Path, edits: EditSpecs) -> None:
    """Checks that scores may be applied: they are of this model and method, and their files are those of the record.

    Raises:
        IntegrityError: If they are not; scores of one method are never applied as another's.
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


def selected_entries(score: ScoreRecord, scores_file: Path, layer: LayerScore, spec: EditSpec) -> Tensor:
    """Entries of one layer to edit; with one score per concept, the union of the concepts' selections.

    A tower that was not scored, as with the method `none`, stays as it is: no entry is selected.

    Args:
        score: Record of the scores.
        scores_file: File of the scores; those of single concepts lie beside it.
        layer: One of the record's layers.
        spec: Selection and keep_mass.

    Returns:
        (k,) int64, ascending flat indices, on the CPU.

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
        with open_tensors(path, fix="score again", kind=IntegrityError) as file:
            scores: Tensor = file.get_tensor(layer)
        yield scores
