"""Puts many edits into one model in turn, from one scoring pass or one fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from uwm_deploy.edits.closed_form import Solved, put, tensors_of
from uwm_deploy.edits.fit_files import read_sums
from uwm_deploy.edits.score_files import check_scores, selected_entries
from uwm_deploy.edits.solving import kept_features, limits_of
from uwm_deploy.edits.strength import choose_strengths, chosen_setting
from uwm_deploy.recipes.edit_spec import ClosedForm, EditSpecs
from uwm_deploy.records.edit import EditStep, FitRecord, ScoreRecord
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.report.console import Reporter
from uwm_deploy.towers.protocol import LoadedModel


def strength_points(
    model: LoadedModel, closed: ClosedForm, fit: FitRecord, folder: Path, losses: Sequence[float], reporter: Reporter
) -> Iterator[tuple[float, AxisSetting]]:
    """Puts the step of every strength into the model in turn, which stays as the last one left it.

    Args:
        model: As the step before left it.
        closed: The step.
        fit: Record of its sums.
        folder: Where the sums and the kept features are.
        losses: Points of safe retrieval that each choice may lose; one under which nothing keeps the limits is left out.
        reporter: Progress.

    Yields:
        The loss and what was chosen under it, while the model holds that edit.

    Raises:
        InputError: If nothing keeps the limits under any of them.
    """
    limits = [limits_of(dataclasses.replace(closed.axis, max_retrieval_loss=loss)) for loss in losses]
    choices, moments = choose_strengths(kept_features(model, fit, folder), limits), read_sums(folder, fit)
    if all(choice.chosen is None for choice in choices):
        chosen_setting(choices[-1])
    made = []
    for loss, choice in zip(losses, choices, strict=True):
        if choice.chosen is None:
            reporter.line(f"sweep      no strength keeps the limits at a loss of {loss:g}")
            continue
        setting = chosen_setting(choice)
        # All are solved before the first is put in, since each is solved from the weights that are there now.
        made.append((loss, setting, tensors_of(model, closed.method, setting, moments, fit.placement)))
    for loss, setting, (tensors, towers) in made:
        put(model, Solved(tensors, towers, EditStep(method=closed.method)))
        yield loss, setting


@dataclass(slots=True)
class _Undo:
    """Original values of the entries of one weight that were touched."""

    weight: Tensor
    touched: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def multiply(self, indices: Tensor, factor: float) -> None:
        flat = self.weight.view(-1)
        at = indices.to(flat.device)
        self.touched.append(at)
        self.values.append(flat[at].clone())
        flat[at] = flat[at] * factor

    def restore(self) -> None:
        flat = self.weight.view(-1)
        for at, values in zip(self.touched, self.values, strict=True):
            flat[at] = values
        self.touched, self.values = [], []


@torch.no_grad()
def edited_points(
    model: LoadedModel,
    score: ScoreRecord,
    scores_file: Path,
    edits: EditSpecs,
    keep_masses: Sequence[float],
    factors: Sequence[float],
) -> Iterator[tuple[float, float, dict[str, float]]]:
    """Puts every point into the model in turn, and leaves the model as it was.

    Selections are nested: what a larger keep_mass selects, a smaller one selects too. So each step multiplies only the
    entries that are new.

    Args:
        model: The source model.
        score: Record of the scores.
        scores_file: The scores; those of single concepts lie beside it.
        edits: Method, and selection per tower; keep_mass and factor are those of the points.
        keep_masses: In any order.
        factors: Multipliers.

    Yields:
        keep_mass, factor, and the share of edited entries per tower, while the model holds that edit.

    Raises:
        IntegrityError: If the scores are of another model or method, or were changed.
    """
    check_scores(model, score, scores_file, edits)
    weights = {layer.name: model.source.get_parameter(f"{layer.name}.weight").detach() for layer in score.layers}
    undo = {name: _Undo(weight) for name, weight in weights.items()}
    for factor in factors:
        done = {name: torch.empty(0, dtype=torch.int64) for name in weights}
        try:
            for keep_mass in sorted(keep_masses, reverse=True):
                for layer in score.layers:
                    spec = dataclasses.replace(edits.of(layer.tower), keep_mass=keep_mass)
                    chosen = selected_entries(score, scores_file, layer, spec)
                    undo[layer.name].multiply(chosen[~torch.isin(chosen, done[layer.name])], factor)
                    done[layer.name] = chosen
                yield keep_mass, factor, _shares(score, done)
        finally:
            for undoing in undo.values():
                undoing.restore()


def _shares(score: ScoreRecord, chosen: Mapping[str, Tensor]) -> dict[str, float]:
    """Edited entries divided by all entries of the edited layers, per tower."""
    shares = {}
    for tower in TowerName:
        layers = [layer for layer in score.layers if layer.tower is tower]
        total = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        shares[tower.value] = sum(len(chosen[layer.name]) for layer in layers) / total if total else 0.0
    return shares
