"""A tiny edited CLIP, and both of its towers exported once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from uwm_deploy.edits.applied import tensor_edit
from uwm_deploy.edits.patch import Patch, TensorPatch, multiply_entries, replaced
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.records.edit import MAP_NAMES, EditKind, Placement, TensorEdit
from uwm_deploy.records.graph import OnnxArtifact
from uwm_deploy.records.model import TextSpec, TowerName
from uwm_deploy.stages.export import onnx_from_tower
from uwm_deploy.towers.digests import digest_of_tensor
from uwm_deploy.towers.embedding_map import with_map
from uwm_deploy.towers.protocol import ModuleTower

BOS, EOS, LENGTH, SIDE = 98, 99, 16, 24
PATTERNS = {TowerName.IMAGE: ["*.mlp.fc2"], TowerName.TEXT: ["*.self_attn.out_proj"]}
LAST = {
    TowerName.IMAGE: ("visual_projection.weight", "vision_model.post_layernorm.bias"),
    TowerName.TEXT: ("text_projection.weight", "text_model.final_layer_norm.bias"),
}
"""What a closed-form step with placement `weights` replaces."""

WEIGHTS_DIGEST = "sha256:" + "ab" * 32


def _tower(name: TowerName) -> ModuleTower:
    from transformers import CLIPConfig

    from uwm_deploy.towers.hf_clip import random_clip, towers_of

    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = shared | {"vocab_size": 100, "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
    vision = shared | {"image_size": SIDE, "patch_size": 8}
    model = random_clip(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    spec = TextSpec(context_length=LENGTH, eos_id=EOS, pad_id=0, tokenizer_digest="")
    return towers_of(model, spec)[0 if name is TowerName.IMAGE else 1]


@dataclass(frozen=True)
class Case:
    """One tower, unedited in the model, with the edit that belongs to it.

    Attributes:
        before: What a second step replaced, or training changed, by name.
    """

    tower: ModuleTower
    edits: tuple[TensorEdit, ...]
    patch: Patch
    before: Mapping[str, Tensor] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        layers = self.tower.layers(PATTERNS[self.tower.name])
        return {f"{path}.weight": layer.weight.detach() for path, layer in layers.items()}

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.tower.graph_module().named_parameters()}

    def inputs(self, rows: int, seed: int = 0) -> Tensor:
        """Noise, or captions of different lengths: start, words, end, padding."""
        generator = torch.Generator().manual_seed(seed)
        if self.tower.name is TowerName.IMAGE:
            return torch.randn(rows, 3, SIDE, SIDE, generator=generator)
        ids = torch.zeros(rows, LENGTH, dtype=torch.int64)
        ids[:, 0] = BOS
        for row in range(rows):
            words = 1 + row % (LENGTH - 2)
            ids[row, 1 : 1 + words] = torch.randint(1, BOS, (words,), generator=generator)
            ids[row, 1 + words] = EOS
        return ids

    def export(self, folder: Path, spec: ExportSpec | None = None, **options: Any) -> OnnxArtifact:
        folder.mkdir(parents=True, exist_ok=True)
        return onnx_from_tower(
            self.tower,
            self.inputs(2),
            spec or ExportSpec(),
            weights_digest=WEIGHTS_DIGEST,
            edits=self.edits,
            patch=self.patch,
            folder=folder,
            **options,
        )


def make_case(name: TowerName, factor: float = -1.0) -> Case:
    """A tower with its edit not applied yet: every seventh entry of every edited layer."""
    tower = _tower(name)
    edits, patches = [], {}
    for path, layer in tower.layers(PATTERNS[name]).items():
        weight = layer.weight.detach()
        edited, indices = weight.clone(), torch.arange(0, weight.numel(), 7, dtype=torch.int32)
        multiply_entries(edited, indices, factor)
        before, after = digest_of_tensor(weight), digest_of_tensor(edited)
        patches[f"{path}.weight"] = TensorPatch(
            indices=indices, factor=factor, digest_before=before, digest_after=after
        )
        edits.append(
            TensorEdit(
                tower=name,
                name=f"{path}.weight",
                shape=(weight.shape[0], weight.shape[1]),
                keep_mass=0.98,
                factor=factor,
                selected=len(indices),
                share=len(indices) / weight.numel(),
                digest_before=before,
                digest_after=after,
            )
        )
    return Case(tower, tuple(edits), Patch(patches))


def make_edited(name: TowerName) -> Case:
    """A tower with its edit applied."""
    case = make_case(name)
    case.patch.apply(case.weights())
    return case


@torch.no_grad()
def make_solved(name: TowerName, placement: Placement) -> Case:
    """A tower with negated entries, and a second step on top: the last map with the bias before it, or a map behind it."""
    case, generator = make_edited(name), torch.Generator().manual_seed(3)
    before: dict[str, Tensor] = {}
    if placement is Placement.EMBEDDING:
        linear = nn.Linear(case.tower.embed_dim, case.tower.embed_dim).eval()
        parts = {f"{MAP_NAMES[name]}.{part}": parameter for part, parameter in linear.named_parameters()}
        linear.weight.copy_(torch.eye(case.tower.embed_dim))
        linear.bias.zero_()
        with_map(case.tower, linear)
    else:
        parts = {n: p for n, p in case.tower.graph_module().named_parameters() if n in LAST[name]}
        before = {n: p.detach().clone() for n, p in parts.items()}
    edits, patches = list(case.edits), dict(case.patch.tensors)
    for tensor, parameter in parts.items():
        parameter += 0.3 * max(float(parameter.std()), 0.1) * torch.randn(parameter.shape, generator=generator)
        after = parameter.detach().clone()
        edits.append(tensor_edit(tensor, name, before.get(tensor), after))
        patches[tensor] = replaced(before.get(tensor), after)
    return replace(case, edits=tuple(edits), patch=Patch(patches), before=before)


@torch.no_grad()
def train(module: nn.Module, tower: TowerName) -> tuple[tuple[TensorEdit, ...], Patch]:
    """Changes every parameter: weights, biases, normalisations and embeddings. Their record and patch."""
    generator, edits, patches = torch.Generator().manual_seed(4), [], {}
    for name, parameter in module.named_parameters():
        before = parameter.clone()
        parameter += 0.2 * max(float(parameter.std()), 0.1) * torch.randn(parameter.shape, generator=generator)
        edit = replace(tensor_edit(name, tower, before, parameter), kind=EditKind.TRAINED)
        digests = {"digest_before": edit.digest_before, "digest_after": edit.digest_after}
        edits.append(edit)
        patches[name] = TensorPatch(kind=EditKind.TRAINED, **digests)
    return tuple(edits), Patch(patches)


def make_trained(name: TowerName) -> Case:
    """A tower of which every parameter was trained."""
    case = make_case(name)
    before = {n: p.clone() for n, p in case.parameters().items()}
    edits, patch = train(case.tower.graph_module(), name)
    return replace(case, edits=edits, patch=patch, before=before)


@dataclass(frozen=True)
class Exported:
    """An edited tower and its graph on disk."""

    case: Case
    artifact: OnnxArtifact
    folder: Path


@pytest.fixture(scope="session", params=list(TowerName), ids=lambda name: name.value)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    case, folder = make_edited(request.param), tmp_path_factory.mktemp(f"export-{request.param.value}")
    return Exported(case, case.export(folder), folder)


@pytest.fixture(scope="session")
def text_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The text tower with the other options: int32 ids, not normalised, weights in a second file."""
    case, folder = make_edited(TowerName.TEXT), tmp_path_factory.mktemp("export-options")
    spec = ExportSpec(normalise=False, ids_dtype="int32")
    return Exported(case, case.export(folder, spec, external_data_bytes=1), folder)


@pytest.fixture(
    scope="session",
    params=[(name, placement) for name in TowerName for placement in Placement],
    ids=lambda part: f"{part[0].value}-{part[1].value}",
)
def solved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tower with a second, closed-form step in either place."""
    case, folder = make_solved(*request.param), tmp_path_factory.mktemp("solved")
    return Exported(case, case.export(folder), folder)


@pytest.fixture(scope="session", params=list(TowerName), ids=lambda name: name.value)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    case, folder = make_trained(request.param), tmp_path_factory.mktemp(f"trained-{request.param.value}")
    return Exported(case, case.export(folder), folder)


@pytest.fixture
def unedited() -> Case:
    return make_case(TowerName.TEXT)


@pytest.fixture
def edited() -> Case:
    return make_edited(TowerName.TEXT)


@pytest.fixture
def zeroed() -> Case:
    """Weights multiplied by 0 where the patch says -1."""
    case = make_case(TowerName.TEXT)
    for name, weight in case.weights().items():
        multiply_entries(weight, case.patch.tensors[name].indices, 0.0)
    return case
