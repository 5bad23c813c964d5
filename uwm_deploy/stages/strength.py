"""Solves a closed-form step, and before it chooses its strength where none was given, from the kept features of a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from uwm_deploy.errors import IntegrityError
from uwm_deploy.recipe import ClosedForm
from uwm_deploy.records import ClosedFormRecord, EditStep, FitRecord
from uwm_deploy.stages.closed_form import Solve, Solved, tensors_of
from uwm_deploy.stages.fit import read_fit, read_sums
from uwm_deploy.towers.protocol import LoadedModel
from uwm_deploy.uwm.digests import digest_of_weights


def solver(spec: ClosedForm, fit: FitRecord, folder: Path, notice: Callable[[str], None]) -> Solve:
    """A function that solves a step for the model that it was fitted on.

    Args:
        spec: The step.
        fit: Record of its sums.
        folder: Where the sums and the kept features are.
        notice: Takes a line about the choice of the strength.
    """

    def solve(model: LoadedModel) -> Solved:
        _check_model(model, fit)
        setting, choice = spec.axis.setting, None
        tensors, towers = tensors_of(model, spec.method, setting, read_sums(folder, fit), fit.placement)
        record = ClosedFormRecord(
            placement=fit.placement, fitted_on=fit.fitted_on, n_pairs=fit.n_pairs, setting=setting, choice=choice
        )
        return Solved(tensors, towers, EditStep(method=spec.method, scores_digest=fit.sums_digest, axis=record))

    return solve


def solved_again(model: LoadedModel, step: EditStep, folder: Path) -> Mapping[str, Tensor]:
    """Tensors of a step, from the sums of its fit and the setting of its record.

    Args:
        model: As the step before left it.
        step: The record.
        folder: Where the sums are.

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
