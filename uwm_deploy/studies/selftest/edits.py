"""Faults of the edit: a model that is not the source with the selected entries negated once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from uwm_deploy.edits.applied import tensor_edit
from uwm_deploy.edits.patch import Patch, TensorPatch, multiply_entries, replaced
from uwm_deploy.records.edit import EditKind, EditRecord
from uwm_deploy.records.model import TowerName
from uwm_deploy.studies.selftest.honest_builds import Build, HonestBuild
from uwm_deploy.studies.selftest.surgery import changed_graph, with_weights
from uwm_deploy.towers.digests import digest_of_tensor, digest_of_weights
from uwm_deploy.towers.embedding_map import save_maps
from uwm_deploy.towers.protocol import MAPS, LoadedModel

Mutate = Callable[[LoadedModel], None]


def edited_by(world: HonestBuild, folder: Path, start: str, mutate: Mutate) -> Build:
    """A whole build of an edited model that was made wrong; record and patch tell of it as if it were right.

    Args:
        world: The honest build.
        folder: An empty folder.
        start: ``original`` or ``edited``: the model that is changed.
        mutate: What the faulty stage does to it.
    """
    model = world.model(None if start == "original" else world.run_folder.edited_model)
    with torch.no_grad():
        mutate(model)
    model.save(folder / "model")
    if model.maps:
        save_maps(model, folder / "model" / MAPS)
    saved = world.model(folder / "model")
    edit, patch = _retold(world, saved)
    files = {
        tower: changed_graph(world.honest.exported[tower], folder, with_weights(saved.tower(tower).graph_module()))
        for tower in changed_towers(world.edited, saved)
    }
    exported = {**world.honest.exported, **files}
    return dataclasses.replace(
        world.honest, edited=saved, edit=edit, patch=patch, exported=exported, engines=exported, sources=exported
    )


def changed_towers(left: LoadedModel, right: LoadedModel) -> list[TowerName]:
    """Towers in which two models differ."""
    found = []
    for tower in TowerName:
        one, two = (digest_of_weights(dict(m.tower(tower).graph_module().named_parameters())) for m in (left, right))
        found += [tower] if one != two else []
    return found


def _retold(world: HonestBuild, saved: LoadedModel) -> tuple[EditRecord, Patch]:
    """Record and patch of what was made, as a faulty stage would write them."""
    before, after = world.original.named_parameters(), saved.named_parameters()
    tensors, parts = [], {}
    for tensor in world.honest.edit.tensors:
        name, values = tensor.name, after[tensor.name].detach()
        part = world.honest.patch.tensors[name]
        if tensor.kind is EditKind.MULTIPLIED:
            tensors.append(dataclasses.replace(tensor, digest_after=digest_of_tensor(values)))
            parts[name] = dataclasses.replace(part, digest_after=digest_of_tensor(values))
        else:
            source = before[name].detach() if name in before else None
            tensors.append(tensor_edit(name, tensor.tower, source, values))
            parts[name] = replaced(source, values)
    edit = dataclasses.replace(
        world.honest.edit, edited_weights_digest=saved.ref.weights_digest, tensors=tuple(tensors)
    )
    return edit, Patch(parts)


def _weight(model: LoadedModel, layer: str) -> Tensor:
    return model.source.get_parameter(layer).data


def _multiply(patches: Mapping[str, TensorPatch], factor: float) -> Mutate:
    def mutate(model: LoadedModel) -> None:
        for name, part in patches.items():
            multiply_entries(_weight(model, name), part.indices, factor)

    return mutate


def applied_twice(world: HonestBuild, folder: Path) -> Build:
    """The patch is its own inverse."""
    return edited_by(world, folder, "edited", _multiply(world.honest.patch.tensors, -1.0))


def factor_zero(world: HonestBuild, folder: Path) -> Build:
    """Entries removed instead of negated."""
    return edited_by(world, folder, "original", _multiply(world.honest.patch.tensors, 0.0))


def layer_missed(world: HonestBuild, folder: Path) -> Build:
    """The last layer stays as it was."""
    last = world.honest.edit.tensors[-1].name
    some = {name: part for name, part in world.honest.patch.tensors.items() if name != last}
    return edited_by(world, folder, "original", _multiply(some, -1.0))


def one_tower(world: HonestBuild, folder: Path) -> Build:
    """The text tower stays as it was."""
    images = {e.name for e in world.honest.edit.tensors if e.tower is TowerName.IMAGE}
    some = {name: part for name, part in world.honest.patch.tensors.items() if name in images}
    return edited_by(world, folder, "original", _multiply(some, -1.0))


def other_entries(world: HonestBuild, folder: Path) -> Build:
    """As many entries as were selected, but the patch of another model: the places are elsewhere."""

    def mutate(model: LoadedModel) -> None:
        for number, (name, part) in enumerate(sorted(world.honest.patch.tensors.items())):
            weight = _weight(model, name)
            places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(number))
            multiply_entries(weight, places[: len(part.indices)].sort().values, part.factor)

    return edited_by(world, folder, "original", mutate)


def bias_touched(world: HonestBuild, folder: Path) -> Build:
    """The edit takes the biases of its layers along."""

    def mutate(model: LoadedModel) -> None:
        for name in world.honest.patch.tensors:
            model.source.get_parameter(f"{name.removesuffix('.weight')}.bias").data.neg_()

    return edited_by(world, folder, "edited", mutate)


def whole_layer(world: HonestBuild, folder: Path) -> Build:
    """A mask that was not applied: every entry of one layer is negated."""
    first = world.honest.edit.tensors[0].name

    def mutate(model: LoadedModel) -> None:
        rest = {name: part for name, part in world.honest.patch.tensors.items() if name != first}
        _multiply(rest, -1.0)(model)
        _weight(model, first).neg_()

    return edited_by(world, folder, "original", mutate)
