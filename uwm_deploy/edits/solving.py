"""Solves a closed-form step from a fit; where no strength was given, it is chosen from the fit's kept features first."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from uwm_deploy.edits.closed_form import Solve, Solved, fitted_weights, tensors_of
from uwm_deploy.edits.features import KeptFeatures, TowerFeatures, ZeroShotFeatures
from uwm_deploy.edits.fit_files import read_features, read_fit, read_sums
from uwm_deploy.edits.strength import choose_strength, chosen_setting
from uwm_deploy.errors import IntegrityError
from uwm_deploy.recipes.edit_spec import AxisSpec, ClosedForm
from uwm_deploy.records.edit import ClosedFormRecord, EditStep, FitRecord, Method
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import FoldKind, StrengthChoice, StrengthLimits
from uwm_deploy.towers.digests import digest_of_weights
from uwm_deploy.towers.protocol import LoadedModel


def solver(spec: ClosedForm, fit: FitRecord, folder: Path, notice: Callable[[str], None]) -> Solve:
    """A function that solves a step for the model that it was fitted on.

    Args:
        spec: The step.
        fit: Record of the fit.
        folder: Folder of the fit.
        notice: Called with a line about the choice of the strength.
    """

    def solve(model: LoadedModel) -> Solved:
        _check_model(model, fit)
        setting, choice = spec.axis.setting, None
        if spec.method is Method.SAFETY_AXIS and setting is None:
            choice = choose_strength(kept_features(model, fit, folder), limits_of(spec.axis))
            setting = chosen_setting(choice)
            notice(f"edit       {chosen_line(choice)}")
        tensors, towers = tensors_of(model, spec.method, setting, read_sums(folder, fit), fit.placement)
        record = ClosedFormRecord(
            placement=fit.placement, fitted_on=fit.fitted_on, n_pairs=fit.n_pairs, setting=setting, choice=choice
        )
        return Solved(tensors, towers, EditStep(method=spec.method, scores_digest=fit.sums_digest, axis=record))

    return solve


def limits_of(axis: AxisSpec) -> StrengthLimits:
    """Limits of a choice of strength, from the recipe."""
    return StrengthLimits(
        retrieval_loss=axis.max_retrieval_loss,
        hard_safe_loss=axis.max_hard_safe_loss,
        zero_shot_loss=axis.max_zero_shot_loss,
    )


def chosen_line(choice: StrengthChoice) -> str:
    """A choice of strength as a line for the user: GS and recall on held-out items and on held-out concepts."""
    assert choice.chosen is not None
    chosen, words = choice.candidates[choice.chosen], []
    for kind, name in ((FoldKind.RANDOM, "unseen items"), (FoldKind.CONCEPTS, "unseen concepts")):
        if (found := chosen.measured.get(kind.value)) is not None:
            before = choice.original[kind.value]
            words.append(
                f"GS {before.gs:.1f} -> {found.gs:.1f} and R@1 {before.recall_at_1:.1f} -> {found.recall_at_1:.1f}"
            )
            words[-1] += f" on {name}"
    kept = sum(candidate.keeps for candidate in choice.candidates)
    return f"strength chosen among {kept} of {len(choice.candidates)} that keep the limits: {'; '.join(words)}"


def kept_features(model: LoadedModel, fit: FitRecord, folder: Path) -> KeptFeatures:
    """Features that a fit kept, for a choice of strength.

    Args:
        model: As the step before left it.
        fit: The record.
        folder: Folder of the fit.
    """
    tensors, weights, start = read_features(folder, fit), fitted_weights(model, fit.placement), "zero_shot."
    names = json.loads(tensors["names"].tobytes())
    sets = sorted({key.removeprefix(start).rpartition(".")[0] for key in tensors if key.startswith(start)})

    def original(key: str, rows: np.ndarray, tower: TowerName) -> np.ndarray:
        """Embeddings of the source model; where no step came before, of the model itself."""
        return tensors[key] if key in tensors else _embedded(rows, weights[tower])

    towers = {}
    for tower in TowerName:
        safe, unsafe = (tensors[f"{tower.value}.{part}"] for part in ("safe", "unsafe"))
        towers[tower] = TowerFeatures(
            safe=safe,
            unsafe=unsafe,
            weight=weights[tower],
            original_safe=original(f"{tower.value}.original_safe", safe, tower),
            original_unsafe=original(f"{tower.value}.original_unsafe", unsafe, tower),
        )
    zero_shot = {}
    for name in sets:
        images, classes = (tensors[f"zero_shot.{name}.{part}"] for part in ("images", "classes"))
        zero_shot[name] = ZeroShotFeatures(
            images=images,
            labels=tensors[f"zero_shot.{name}.labels"],
            classes=classes,
            original_images=original(f"zero_shot.{name}.original_images", images, TowerName.IMAGE),
            original_classes=original(f"zero_shot.{name}.original_classes", classes, TowerName.TEXT),
        )
    return KeptFeatures(ids=tuple(names["ids"]), concepts=tuple(names["concepts"]), towers=towers, zero_shot=zero_shot)


def _embedded(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Embeddings (n, d) float32, rows of length 1, of features (n, m)."""
    embeds = rows.astype(np.float64) @ weight.T
    result: np.ndarray = (embeds / np.linalg.norm(embeds, axis=1, keepdims=True)).astype(np.float32)
    return result


def solved_again(model: LoadedModel, step: EditStep, folder: Path) -> Mapping[str, Tensor]:
    """Solves a step again, from the sums of its fit and the setting of its record.

    Args:
        model: As the step before left it.
        step: The record.
        folder: Folder of the fit.

    Returns:
        Values by parameter, float32 on the CPU, any shape (the parameter's own).

    Raises:
        IntegrityError: If the sums are of another model, or not those of the record.
    """
    fit = read_fit(folder)
    _check_model(model, fit)
    if fit.sums_digest != step.scores_digest or step.axis is None:
        raise IntegrityError("the fit is not the one that the edit was solved from", fix="remove the run folder")
    return tensors_of(model, step.method, step.axis.setting, read_sums(folder, fit), fit.placement)[0]


def _check_model(model: LoadedModel, fit: FitRecord) -> None:
    if digest_of_weights(model.named_parameters()) != fit.fitted_on:
        raise IntegrityError("the fit is of another model", fix="fit this model")
