"""Faults of export and compilation: graphs and engines that are not the edited model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import Tensor, nn

from uwm_deploy.edits.patch import multiply_entries
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.model import TowerName
from uwm_deploy.stages.convert.convert import converted
from uwm_deploy.studies.selftest import surgery, tampering
from uwm_deploy.studies.selftest.honest_builds import Build, HonestBuild
from uwm_deploy.studies.selftest.surgery import Change, changed_graph, with_weights
from uwm_deploy.studies.selftest.tampering import Condition
from uwm_deploy.towers.protocol import LoadedModel, ModuleTower

Plant = Callable[[HonestBuild, Path], Build]
How = Callable[[Mapping[TowerName, Change]], Plant]


def exported_with(changes: Mapping[TowerName, Change]) -> Plant:
    """An export that changes the graph; the engine is compiled from it."""

    def plant(world: HonestBuild, folder: Path) -> Build:
        honest = world.honest
        files = {tower: changed_graph(honest.exported[tower], folder, change) for tower, change in changes.items()}
        exported = {**honest.exported, **files}
        return dataclasses.replace(honest, exported=exported, engines=exported, sources=exported)

    return plant


def compiled_with(changes: Mapping[TowerName, Change]) -> Plant:
    """A compiler that changes what it compiles; the exported graph is right."""

    def plant(world: HonestBuild, folder: Path) -> Build:
        honest = world.honest
        files = {tower: changed_graph(honest.exported[tower], folder, change) for tower, change in changes.items()}
        return dataclasses.replace(honest, engines={**honest.engines, **files})

    return plant


def both(change: Change) -> dict[TowerName, Change]:
    """The same change in both towers."""
    return dict.fromkeys(TowerName, change)


def unedited(towers: tuple[TowerName, ...], how: How) -> Plant:
    """The original model's weights under the name of the edited one."""

    def plant(world: HonestBuild, folder: Path) -> Build:
        return how({t: with_weights(world.original.tower(t).graph_module()) for t in towers})(world, folder)

    return plant


def choosing(tower: TowerName, condition: Callable[[HonestBuild], Condition], how: How, share: float = 1.0) -> Plant:
    """A graph with the unedited model beside the edited one, and something that chooses between them.

    Args:
        tower: Which tower has it.
        condition: What chooses.
        how: `exported_with` or `compiled_with`.
        share: Of the unedited model in what comes out.
    """

    def plant(world: HonestBuild, folder: Path) -> Build:
        change = with_weights(world.original.tower(tower).graph_module())
        other = onnx.load(changed_graph(world.honest.exported[tower], folder / "unedited", change))
        return how({tower: tampering.chosen_by(condition(world), other, share)})(world, folder)

    return plant


def turning(tower: TowerName, condition: Callable[[HonestBuild], Condition], how: How) -> Plant:
    """A graph that turns the embeddings around which a condition chooses; no weight of another model is in it.

    Args:
        tower: Which tower has it.
        condition: What chooses.
        how: `exported_with` or `compiled_with`.
    """

    def plant(world: HonestBuild, folder: Path) -> Build:
        return how({tower: tampering.turned_by(condition(world))})(world, folder)

    return plant


def always(condition: Condition) -> Callable[[HonestBuild], Condition]:
    """The same condition in every world."""
    return lambda _: condition


def word_of_no_caption(world: HonestBuild) -> Condition:
    """A word that no item of the evaluation set has."""
    there = world.honest.prepared
    used = set(there.safe_ids.ravel().tolist()) | set(there.unsafe_ids.ravel().tolist())
    return tampering.token(max(set(range(world.original.ref.text.eos_id)) - used))


def first_concept(world: HonestBuild) -> Condition:
    """Unsafe images of one concept, and hardly any others."""
    original, concepts = world.embedded[0], np.asarray(world.honest.prepared.concepts)
    rows = concepts == sorted(set(concepts))[0]
    mean = original.unsafe_image[rows].mean(axis=0)
    direction = mean - original.safe_image.mean(axis=0)
    return tampering.near(direction, float(np.quantile(original.unsafe_image[rows] @ direction, 0.1)))


def context_cut(world: HonestBuild, folder: Path) -> Build:
    """The last position of the longest captions is not read."""
    text = world.original.ref.text
    change = tampering.context_cut(text.context_length - 1, text.eos_id)
    return exported_with({TowerName.TEXT: change})(world, folder)


def tower_of_another_build(world: HonestBuild, folder: Path) -> Build:
    """The text engine of a build that edited fewer entries."""
    other = world.model(None)
    for name, part in world.honest.patch.tensors.items():
        half = part.indices[: len(part.indices) // 2]
        multiply_entries(other.source.get_parameter(name).data, half, part.factor)
    return compiled_with({TowerName.TEXT: with_weights(other.text.graph_module())})(world, folder)


def weights_truncated(world: HonestBuild, folder: Path) -> Build:
    """Weights cut to 8-bit integers, their scales lost; the edited layers are kept as they are."""
    kept = set(world.honest.patch.tensors)

    def cut(array: np.ndarray) -> np.ndarray:
        return np.clip(np.trunc(array * 16), -128, 127) / 16 if array.ndim == 2 else array

    change = surgery.weights_where(lambda name: name.endswith(".weight") and name not in kept, cut)
    return exported_with(both(change))(world, folder)


def colours_reversed(world: HonestBuild, folder: Path) -> Build:
    """A graph for images whose channels come in the order blue, green, red."""
    change = surgery.weights_where(
        lambda name: name.endswith("patch_embedding.weight"), lambda array: np.ascontiguousarray(array[:, ::-1])
    )
    return exported_with({TowerName.IMAGE: change})(world, folder)


def in_half_precision(world: HonestBuild, folder: Path) -> Build:
    """The exported graphs, rightly converted to half precision; a map behind the embedding stays in float32."""
    folder.mkdir(parents=True)
    records = {}
    for tower, graph in world.onnx.items():
        records[tower] = converted(
            graph,
            world.run_folder.export,
            folder,
            precision=Precision.FP16,
            lowered=Precision.FP16,
            patterns=(),
            layers=(),
            ranges=None,
            edits=world.honest.edit.of(tower),
            patch=world.honest.patch,
            canaries=None,
        )
    files = {tower: folder / record.file for tower, record in records.items()}
    return dataclasses.replace(world.honest, engines=files, sources=files, precision=Precision.FP16, converted=records)


def half_precision_overflow(world: HonestBuild, folder: Path) -> Build:
    """A half-precision engine in which a value exceeds 65504."""
    change = surgery.overflowing("vision_model.post_layernorm", "visual_projection.weight", 3e4)
    return lowered_with({TowerName.IMAGE: change})(world, folder)


def lowered_with(changes: Mapping[TowerName, Change]) -> Plant:
    """A compiler that changes half-precision graphs; what it compiles is right."""

    def plant(world: HonestBuild, folder: Path) -> Build:
        honest = in_half_precision(world, folder / "fp16")
        files = {t: changed_graph(honest.engines[t], folder / "engine", change) for t, change in changes.items()}
        return dataclasses.replace(honest, engines={**honest.engines, **files})

    return plant


def not_a_number(world: HonestBuild, folder: Path) -> Build:
    """One NaN in a bias."""

    def spoil(array: np.ndarray) -> np.ndarray:
        spoilt: np.ndarray = array.copy()
        spoilt[0] = np.nan
        return spoilt

    change = surgery.weights_where(lambda name: name == "vision_model.post_layernorm.bias", spoil)
    return compiled_with({TowerName.IMAGE: change})(world, folder)


def noise_in_weights(world: HonestBuild, folder: Path) -> Build:
    """An engine whose weights are a little off, as after a lossy compression; the edited ones are whole."""
    rng = np.random.default_rng(0)
    kept = set(world.honest.patch.tensors)

    def spoil(array: np.ndarray) -> np.ndarray:
        noise = rng.normal(scale=0.01, size=array.shape) * array.std()
        return array + noise if array.ndim == 2 else array

    change = surgery.weights_where(lambda name: name.endswith(".weight") and name not in kept, spoil)
    honest = world.honest  # in the engine itself, so that nothing but its weights is other than the compiler's
    files = {tower: changed_graph(engine, folder, change) for tower, engine in honest.engines.items()}
    return dataclasses.replace(honest, engines=files)


class _PooledAtStart(nn.Module):
    """A text tower that reads the embedding at the start token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_model: Any
        self.text_projection: Any
        self.text_model, self.text_projection = model.text_model, model.text_projection

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) to (B, d)."""
        states = self.text_model(input_ids=input_ids).last_hidden_state  # after the last normalisation
        result: Tensor = self.text_projection(states[:, 0])
        return result


class _OtherActivation(nn.Module):
    """An image tower around a copy of the model whose activation is the exact GELU."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model: Any
        self.visual_projection: Any
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self._layers = list(model.vision_model.encoder.layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, d)."""
        kept = [layer.mlp.activation_fn for layer in self._layers]
        for layer in self._layers:
            layer.mlp.activation_fn = nn.GELU()
        result: Tensor = self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)
        for layer, activation in zip(self._layers, kept, strict=True):
            layer.mlp.activation_fn = activation
        return result


def with_tower(model: LoadedModel, tower: TowerName, graph: nn.Module) -> LoadedModel:
    """A model one of whose towers computes something else."""
    new = ModuleTower(graph, tower, model.tower(tower).embed_dim)
    if tower is TowerName.IMAGE:
        return dataclasses.replace(model, image=new)
    return dataclasses.replace(model, text=new)


def adapter_with(tower: TowerName, wrap: Callable[[nn.Module], nn.Module], change: Change) -> Plant:
    """A tower that is wrong in PyTorch already, so that reference, graph and engine agree with each other.

    Args:
        tower: Which.
        wrap: The wrong tower around the library's model.
        change: What the graph of it has.
    """

    def plant(world: HonestBuild, folder: Path) -> Build:
        honest = exported_with({tower: change})(world, folder)
        models = (with_tower(m, tower, wrap(m.source)) for m in (world.original, world.edited))
        original, edited = models
        return dataclasses.replace(honest, original=original, edited=edited)

    return plant


pooled_by_the_adapter = adapter_with(TowerName.TEXT, _PooledAtStart, surgery.pool_at_start)
activation_of_the_adapter = adapter_with(TowerName.IMAGE, _OtherActivation, surgery.gelu_for_quick_gelu)
