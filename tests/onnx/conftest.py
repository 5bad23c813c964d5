"""A tiny edited CLIP, and both of its towers exported once for all tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig

from uwm_deploy.recipe import ExportSpec
from uwm_deploy.records import LayerEdit, OnnxArtifact, TextSpec, TowerName
from uwm_deploy.stages.export import onnx_from_tower
from uwm_deploy.towers.hf_clip import random_clip, towers_of
from uwm_deploy.towers.protocol import ModuleTower
from uwm_deploy.uwm.digests import digest_of_tensor
from uwm_deploy.uwm.patch import LayerPatch, Patch, multiply_entries

BOS, EOS, LENGTH, SIDE = 98, 99, 16, 24
PATTERNS = {TowerName.IMAGE: ["*.mlp.fc2"], TowerName.TEXT: ["*.self_attn.out_proj"]}
WEIGHTS_DIGEST = "sha256:" + "ab" * 32


def _tower(name: TowerName) -> ModuleTower:
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = shared | {"vocab_size": 100, "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
    vision = shared | {"image_size": SIDE, "patch_size": 8}
    model = random_clip(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    spec = TextSpec(context_length=LENGTH, eos_id=EOS, pad_id=0, tokenizer_digest="")
    return towers_of(model, spec)[0 if name is TowerName.IMAGE else 1]


@dataclass(frozen=True)
class Case:
    """One tower, unedited in the model, with the edit that belongs to it."""

    tower: ModuleTower
    edits: tuple[LayerEdit, ...]
    patch: Patch

    def weights(self) -> dict[str, Tensor]:
        return {name: layer.weight.detach() for name, layer in self.tower.layers(PATTERNS[self.tower.name]).items()}

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

    def export(self, folder: Path, spec: ExportSpec | None = None, **options: int) -> OnnxArtifact:
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
        patches[path] = LayerPatch(indices=indices, factor=factor, digest_before=before, digest_after=after)
        edits.append(
            LayerEdit(
                tower=name,
                name=path,
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
        multiply_entries(weight, case.patch.layers[name].indices, 0.0)
    return case
