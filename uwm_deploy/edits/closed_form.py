"""A closed-form step, from the sums of a fit to tensors of the model (docs/background/safety-axis.md).

The step is solved in float64 on the CPU. The caller checks the edited model against the solution on real inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uwm_deploy.edits.axis import AffineMap, maps_of
from uwm_deploy.edits.fold import folded_into_bias, folded_into_norm, with_bias
from uwm_deploy.edits.leace import leace_maps
from uwm_deploy.edits.moments import Moments
from uwm_deploy.errors import InputError
from uwm_deploy.recipes.edit_spec import ClosedForm, only_embeddings
from uwm_deploy.records.edit import MAP_NAMES, EditStep, Method, Placement
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.towers.embedding_map import put_maps
from uwm_deploy.towers.protocol import LastMap, LoadedModel, Tower


@dataclass(frozen=True, slots=True)
class Solved:
    """A solved step.

    Attributes:
        tensors: Parameter to its new values, float32 on the CPU, any shape (the parameter's own); names as in
            `LoadedModel.named_parameters`.
        towers: Parameter to the tower whose graph holds it.
        step: Its record.
    """

    tensors: Mapping[str, Tensor]
    towers: Mapping[str, TowerName]
    step: EditStep


Solve = Callable[[LoadedModel], Solved]
"""Solves a step for the model as the step before left it."""


def last_tensors(model: LoadedModel) -> dict[str, Tensor]:
    """Parameters that a closed-form step with placement `weights` replaces.

    Returns:
        Values by parameter, in the model's dtype and on its device: the last map (d, m), or (m, d) where it is transposed,
        and its bias (d,), or the bias (m,) of the LayerNorm before it.
    """
    parameters = model.named_parameters()
    maps = [found for tower in TowerName if (found := model.tower(tower).last_map) is not None]
    return {name: parameters[name].detach() for last in maps for name in _names(last)}


def _names(last: LastMap) -> tuple[str, str]:
    return (last.weight, last.bias or last.norm_bias)


def placement_of(model: LoadedModel, spec: ClosedForm) -> tuple[Placement, str]:
    """Placement of a step, and the reason for it where the recipe leaves it open.

    Raises:
        InputError: If the family is used by its hidden states and not by its embeddings, its towers have no place for the
            step, or the model has embedding maps already.
    """
    refuse_hidden_states(model, spec.method)
    if model.maps:
        raise InputError(
            f"{model.ref.name} has maps behind its embeddings already, and there is place for one",
            fix="edit the model that it was made from",
        )
    reasons = [reason for tower in TowerName if (reason := _reason_against_weights(model, tower))]
    if spec.axis.placement == "weights" and reasons:
        raise InputError(f"placement weights: {reasons[0]}", fix="use --placement embedding")
    if spec.axis.placement == "embedding":
        return Placement.EMBEDDING, ""
    if reasons:
        return Placement.EMBEDDING, f"placement embedding, for {reasons[0]}"
    return Placement.WEIGHTS, "" if spec.axis.placement == "weights" else "placement weights: no new node in the graphs"


def refuse_hidden_states(model: LoadedModel, method: Method) -> None:
    """Refuses models that are used by their hidden states, which a closed-form step does not change.

    Raises:
        InputError: If a tower has outputs beside its embedding.
    """
    if any(len(model.tower(tower).output_names) > 1 for tower in TowerName):
        raise InputError(
            f"{only_embeddings(method)}, and {model.ref.name} is used by its inner features",
            fix="use --method uwm, which changes the layers before them",
        )


def _reason_against_weights(model: LoadedModel, tower: TowerName) -> str:
    last = model.tower(tower).last_map
    if last is None:
        return f"the {tower.value} tower does not end with a LayerNorm and a linear map"
    parameters = model.named_parameters()
    gain = parameters[last.norm_gain].detach().abs()
    rows, columns = _weight(parameters[last.weight], last).shape
    if not last.bias and columns < rows:
        return f"the last map of the {tower.value} tower goes from {columns} to {rows} dimensions, so no bias fits in"
    if not last.bias and not bool(gain.min() > 1e-6 * gain.max()):
        return f"the last LayerNorm of the {tower.value} tower has a weight of zero"
    return ""


def _weight(parameter: Tensor, last: LastMap) -> Tensor:
    """The last map as (d, m), whichever way it is stored."""
    weight: Tensor = parameter.detach()
    return weight.T if last.transposed else weight


def fitted_weights(model: LoadedModel, placement: Placement) -> dict[TowerName, np.ndarray]:
    """Linear map from fitted features to embeddings: the last map, or the identity for placement `embedding`.

    Args:
        model: As the step before left it.
        placement: Of the step.

    Returns:
        (d, m) float64 per tower; the last of the m columns is the bias where the last map has one.
    """
    if placement is Placement.EMBEDDING:
        return {tower: np.eye(model.ref.embed_dim) for tower in TowerName}
    parameters, found = model.named_parameters(), {}
    for tower in TowerName:
        last = _last(model.tower(tower))
        weight = _weight(parameters[last.weight], last).cpu().double().numpy()
        bias = parameters[last.bias].detach().cpu().double().numpy() if last.bias else None
        found[tower] = weight if bias is None else with_bias(weight, bias)
    return found


def _last(tower: Tower) -> LastMap:
    assert tower.last_map is not None
    return tower.last_map


@contextlib.contextmanager
def features_in_place(
    model: LoadedModel, tower: TowerName, placement: Placement
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Gives, for as long as the block lasts, a function from inputs to the features that a step is fitted on.

    With placement `weights` the last map is the identity inside the block, so `embed` gives that map's inputs, whatever the
    family.

    Yields:
        Inputs of the tower (B, 3, H, W) float32 or (B, L) int64 to features (B, m) float32, on the tower's device.
    """
    embed = model.tower(tower).embed
    if placement is Placement.EMBEDDING:
        yield lambda inputs: _unit(embed(inputs).float())
        return
    last, parameters = _last(model.tower(tower)), model.named_parameters()
    weight, bias = parameters[last.weight], parameters.get(last.bias)
    before = [(part, part.data) for part in (weight, bias) if part is not None]
    size = _weight(weight, last).shape[1]
    try:
        weight.data = torch.eye(size, dtype=weight.dtype, device=weight.device)
        if bias is not None:
            bias.data = torch.zeros(size, dtype=bias.dtype, device=bias.device)
            ones = torch.ones(1, 1, device=weight.device)
            yield lambda inputs: torch.cat([(rows := embed(inputs).float()), ones.expand(len(rows), 1)], 1)
        else:
            yield lambda inputs: embed(inputs).float()
    finally:
        for part, data in before:
            part.data = data


def _unit(rows: Tensor) -> Tensor:
    result: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return result


def tensors_of(
    model: LoadedModel,
    method: Method,
    setting: AxisSetting | None,
    moments: Mapping[TowerName, Moments],
    placement: Placement,
) -> tuple[dict[str, Tensor], dict[str, TowerName]]:
    """Solves a step.

    Args:
        model: As the step before left it; not changed.
        method: Of closed form.
        setting: Of the safety axis.
        moments: Of the fit, per tower.
        placement: Of the step.

    Returns:
        New values by parameter, float32 on the CPU, any shape (the parameter's own; (d, d) and (d,) for a map behind an
        embedding); and the tower of each.

    Raises:
        InputError: If the weights cannot hold the step, or the setting does not fit the model.
    """
    weights = fitted_weights(model, placement)
    maps: Mapping[TowerName, AffineMap]
    if method is Method.LEACE:
        maps = leace_maps(moments, weights)
        carriers = {tower: _direction(part.bias) for tower, part in maps.items()}
    else:
        assert setting is not None
        made = maps_of(moments, weights, setting)
        maps, carriers = made.maps, {tower: made.constant_axis(tower) for tower in TowerName}
    tensors: dict[str, np.ndarray] = {}
    towers: dict[str, TowerName] = {}
    for tower in TowerName:
        if placement is Placement.EMBEDDING:
            parts = {f"{MAP_NAMES[tower]}.weight": maps[tower].weight, f"{MAP_NAMES[tower]}.bias": maps[tower].bias}
        else:
            parts = _folded(model, tower, maps[tower], carriers[tower])
        tensors |= parts
        towers |= dict.fromkeys(parts, tower)
    return {name: torch.from_numpy(np.ascontiguousarray(t, dtype=np.float32)) for name, t in tensors.items()}, towers


def _direction(vector: np.ndarray) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    result: np.ndarray = vector / length if length > 0 else vector
    return result


def _folded(model: LoadedModel, tower: TowerName, wanted: AffineMap, carrier: np.ndarray) -> dict[str, np.ndarray]:
    last, parameters = _last(model.tower(tower)), model.named_parameters()
    if last.bias:
        biased = folded_into_bias(wanted)
        weight, other = biased.weight, {last.bias: biased.bias}
    else:
        gamma, beta = (parameters[name].detach().cpu().double().numpy() for name in (last.norm_gain, last.norm_bias))
        folded = folded_into_norm(wanted, gamma, beta, carrier)
        weight, other = folded.weight, {last.norm_bias: folded.norm_bias}
    return {last.weight: weight.T if last.transposed else weight, **other}


@torch.no_grad()
def put(model: LoadedModel, solved: Solved) -> None:
    """Puts a solved step into a model, in place."""
    parameters = model.named_parameters()
    new = {name: tensor for name, tensor in solved.tensors.items() if name not in parameters}
    for name, tensor in solved.tensors.items():
        if name in parameters:
            parameters[name].copy_(tensor)
    if new:
        put_maps(model, new)
