"""Faults of a closed-form step: tensors that are not what its fit gives, and maps that are not behind an embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from uwm_deploy.edits.closed_form import tensors_of
from uwm_deploy.edits.fit_files import read_fit, read_sums
from uwm_deploy.edits.moments import Moments
from uwm_deploy.edits.patch import Patch
from uwm_deploy.records.edit import MAP_NAMES, ClosedFormRecord, EditKind, EditRecord
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.stages.fit import fit_to_folder
from uwm_deploy.studies.selftest import surgery
from uwm_deploy.studies.selftest.artifacts import exported_with, in_half_precision, with_tower
from uwm_deploy.studies.selftest.edits import edited_by
from uwm_deploy.studies.selftest.honest_builds import PAIRS_SCORED, Build, HonestBuild, data_file
from uwm_deploy.studies.selftest.surgery import changed_graph
from uwm_deploy.towers.protocol import LoadedModel

Plant = Callable[[HonestBuild, Path], Build]
Sums = Mapping[TowerName, Moments]


# --- the fit, and what is solved from it ------------------------------------------------------------------------------


def _record(world: HonestBuild) -> ClosedFormRecord:
    step = world.honest.edit.closed_form
    assert step is not None
    assert step.axis is not None
    return step.axis


def _setting(world: HonestBuild) -> AxisSetting:
    setting = _record(world).setting
    assert setting is not None
    return setting


def _sums(world: HonestBuild) -> Sums:
    folder = world.run_folder.fit
    return read_sums(folder, read_fit(folder))


def _sums_of(world: HonestBuild, model: LoadedModel, definition: str, folder: Path) -> Sums:
    """Sums of another model, or over another set."""
    source = world.open(definition)
    concepts = dict(zip(source.ids, source.concepts, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    fit = fit_to_folder(
        model,
        None,
        source.record,
        lambda tower: world.pairs(source, tower),
        concepts,
        {},
        world.honest.edit.steps[-1].method,
        _record(world).placement,
        folder,
    )
    assert fit is not None
    return read_sums(folder, fit)


def _solved(world: HonestBuild, setting: AxisSetting, sums: Sums) -> dict[str, Tensor]:
    method, placement = world.honest.edit.steps[-1].method, _record(world).placement
    return tensors_of(world.before, method, setting, sums, placement)[0]


def _with_tensors(world: HonestBuild, folder: Path, tensors: Mapping[str, Tensor]) -> Build:
    """A step that put other tensors into the model; the record tells the setting that was asked for."""

    def mutate(model: LoadedModel) -> None:
        parameters = model.named_parameters()
        for name, values in tensors.items():
            parameters[name].copy_(values)

    return edited_by(world, folder, "edited", mutate)


def with_setting(change: Callable[[AxisSetting], AxisSetting]) -> Plant:
    """A step that was solved with another setting than it says."""

    def plant(world: HonestBuild, folder: Path) -> Build:
        return _with_tensors(world, folder, _solved(world, change(_setting(world)), _sums(world)))

    return plant


def setting_not_asked_for(world: HonestBuild, folder: Path) -> Build:
    """A stronger edit than the recipe's; record and patch tell of it as it is."""
    setting = dataclasses.replace(_setting(world), g=0.9)
    build = _with_tensors(world, folder, _solved(world, setting, _sums(world)))
    return dataclasses.replace(build, edit=_with_axis(build.edit, setting))


def _with_axis(edit: EditRecord, setting: AxisSetting) -> EditRecord:
    last = edit.steps[-1]
    assert last.axis is not None
    step = dataclasses.replace(last, axis=dataclasses.replace(last.axis, setting=setting))
    return dataclasses.replace(edit, steps=(*edit.steps[:-1], step))


def of_another_set(world: HonestBuild, folder: Path) -> Build:
    """Solved from the sums over another sample."""
    other = data_file(folder, "other", "calibration", PAIRS_SCORED, seed=1)
    return _with_tensors(
        world, folder, _solved(world, _setting(world), _sums_of(world, world.before, other, folder / "fit"))
    )


def of_the_unedited_model(world: HonestBuild, folder: Path) -> Build:
    """Solved from the features of the source model, and put on top of the step before."""
    sums = _sums_of(world, world.original, world.calibration, folder / "fit")
    return _with_tensors(world, folder, _solved(world, _setting(world), sums))


# --- what is put into the model ---------------------------------------------------------------------------------------


def _unedited(world: HonestBuild, wanted: Callable[[TowerName, str], bool]) -> dict[str, Tensor]:
    """The source model's values of some of the tensors that the step replaces."""
    before = world.original.named_parameters()
    return {
        tensor.name: before[tensor.name].detach()
        for tensor in world.honest.edit.tensors
        if tensor.kind is EditKind.REPLACED and tensor.tower and wanted(tensor.tower, tensor.name)
    }


def constant_not_folded(world: HonestBuild, folder: Path) -> Build:
    """The projections are right, and the biases of the normalisations before them stay as they were."""
    return _with_tensors(world, folder, _unedited(world, lambda _, name: name.endswith(".bias")))


def one_tower(world: HonestBuild, folder: Path) -> Build:
    """The text tower ends as it did."""
    return _with_tensors(world, folder, _unedited(world, lambda tower, _: tower is TowerName.TEXT))


def maps_exchanged(world: HonestBuild, folder: Path) -> Build:
    """The map of each tower behind the other one."""
    made, (image, text) = world.edited.named_parameters(), (MAP_NAMES[tower] for tower in TowerName)
    swapped = {
        f"{here}.{part}": made[f"{there}.{part}"].detach()
        for here, there in ((image, text), (text, image))
        for part in ("weight", "bias")
    }
    return _with_tensors(world, folder, swapped)


def step_left_out(world: HonestBuild, folder: Path) -> Build:
    """The step was not made, and record and patch do not speak of it."""
    build = _with_tensors(world, folder, _unedited(world, lambda *_: True))
    kept = {tensor.name for tensor in build.edit.tensors if tensor.kind is EditKind.MULTIPLIED}
    told = dataclasses.replace(build.edit, steps=build.edit.steps[:-1])
    return _telling_of(dataclasses.replace(build, edit=told), kept)


def tensor_not_listed(world: HonestBuild, _: Path) -> Build:
    """A whole edit, of which record and patch leave out the bias of a normalisation."""
    biases = [t.name for t in world.honest.edit.tensors if t.name.endswith(".bias")]
    return _telling_of(world.honest, {t.name for t in world.honest.edit.tensors} - set(biases[:1]))


def patch_of_other_values(world: HonestBuild, _: Path) -> Build:
    """A whole edit, whose patch holds other bits of a projection than its digests are of."""
    name = next(t.name for t in world.honest.edit.tensors if t.kind is EditKind.REPLACED)
    part = world.honest.patch.tensors[name]
    other = dataclasses.replace(part, bits=part.bits.flip(0))
    return dataclasses.replace(world.honest, patch=Patch({**world.honest.patch.tensors, name: other}))


def _telling_of(build: Build, names: set[str]) -> Build:
    """A build whose record and patch name some of the tensors only."""
    edit = dataclasses.replace(build.edit, tensors=tuple(t for t in build.edit.tensors if t.name in names))
    patch = Patch({name: part for name, part in build.patch.tensors.items() if name in names})
    return dataclasses.replace(build, edit=edit, patch=patch)


# --- maps in graphs ---------------------------------------------------------------------------------------------------


def map_in_half_precision(world: HonestBuild, folder: Path) -> Build:
    """Half-precision engines by a converter that does not know that the maps stay in float32."""
    honest = in_half_precision(world, folder / "fp16")
    files = {
        t: changed_graph(path, folder / "maps", surgery.map_in_half_precision) for t, path in honest.engines.items()
    }
    return dataclasses.replace(honest, engines=files, sources=files, converted={})


class _MapOfAnyLength(nn.Module):
    """A text tower whose map gets embeddings as long as they are."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        source: Any = model.source
        self.text_model: Any = source.text_model
        self.text_projection: Any = source.text_projection
        self.text_map = model.maps[TowerName.TEXT]

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) to (B, d)."""
        embeds = self.text_projection(self.text_model(input_ids=input_ids).pooler_output)
        result: Tensor = self.text_map(embeds)
        return result


def any_length_in_the_adapter(world: HonestBuild, folder: Path) -> Build:
    """The map is wrong in PyTorch already, so that reference, graph and engine agree with each other."""
    build = exported_with({TowerName.TEXT: surgery.map_of_any_length})(world, folder)
    edited = with_tower(world.edited, TowerName.TEXT, _MapOfAnyLength(world.edited))
    return dataclasses.replace(build, edited=edited)
