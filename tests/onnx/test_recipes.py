"""Every recipe from score to ONNX Runtime, reduced, with random weights; scores and masks against the slow formulas."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import FAMILIES, model_of, reduced
from tests.oracles import uwm_oracle
from uwm_deploy.data.demo.source import DemoSource
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.edits.patch import Patch, TensorPatch
from uwm_deploy.edits.selection import selected_indices
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.edit import TensorEdit
from uwm_deploy.records.graph import OnnxArtifact, Precision, Profile, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.session import open_graph
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.convert.convert import converted, embed_with, ranges_of
from uwm_deploy.stages.edit.edit import edit_to_folder
from uwm_deploy.stages.export import onnx_from_tower
from uwm_deploy.stages.score.score import score_to_folder
from uwm_deploy.stages.traced import sample_of
from uwm_deploy.towers.digests import digest_of_tensor
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel

PAIRS = 6
AGREEMENT = 0.9995
LOWERED = ("clip-vit-b32", "siglip-base", "coca-vit-b32")
"""Recipes that are taken through the precisions; all but the first where slow tests are asked for."""
FAST = ("clip-vit-l14", "siglip2-base", "coca-vit-l14", "llava-1.5-7b")
"""One recipe of each kind of tower, for what the others do alike."""

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LOWERED[1:]]

PROFILE = Profile(min=1, opt=2, max=5)


def source() -> DemoSource:
    spec, _, _ = calibration_set_of("demo")
    return DemoSource(dataclasses.replace(spec, limit=PAIRS))


def pairs_of(model: LoadedModel, name: TowerName) -> PairStream:
    return PairStream(
        source(), name, model.ref.image, Tokenizer(model.tokenizer_json, model.ref.text),
        batch_pairs=4, workers=0, max_broken_share=0.0, progress=lambda *_: None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in FAMILIES]
)
def test_from_score_to_onnx_runtime(name: str, tmp_path: Path) -> None:
    """Scores, edits, saves, loads, exports with its fingerprint; ONNX Runtime embeds as PyTorch does."""
    from_score_to_onnx_runtime(name, tmp_path)


@pytest.mark.parametrize("name", [LOWERED[0], *SLOW])
def test_lower_precisions_from_score_to_onnx_runtime(name: str, tmp_path: Path) -> None:
    """The same, and each exported graph in fp16 and in 8 bits, which is executed and compiled."""
    from_score_to_onnx_runtime(name, tmp_path, lowered=True)


def from_score_to_onnx_runtime(name: str, tmp_path: Path, *, lowered: bool = False) -> None:
    recipe = reduced(name)
    model = load_model(recipe, folder=None, device="cpu")
    before = {n: p.detach().clone() for n, p in model.source.named_parameters()}
    score = score_to_folder(model, source().record, lambda t: pairs_of(model, t), recipe.entries, tmp_path)
    edit = edit_to_folder(model, score, tmp_path / "scores.safetensors", recipe.entries, tmp_path)
    patch = Patch.from_file(tmp_path / "patch.safetensors")
    edited = load_model(recipe, folder=tmp_path / "model", device="cpu")
    assert {tensor.tower for tensor in edit.tensors if tensor.selected} == set(recipe.entries.towers)
    for name, part in patch.tensors.items():
        before[name].view(-1)[part.indices.long()] *= -1
    for parameter, value in edited.source.named_parameters():
        assert torch.equal(value, before[parameter])
    assert all(tensor.selected for tensor in edit.tensors if tensor.tower in recipe.entries.towers)
    for tower in TowerName:
        graph, rows = check_export(edited, tower, recipe, edit, patch, tmp_path)
        if lowered:
            check_lowered(graph, edit.of(tower), patch, rows, tmp_path)


def check_export(
    model: LoadedModel, name: TowerName, recipe: Any, edit: Any, patch: Patch, folder: Path
) -> tuple[OnnxArtifact, np.ndarray]:
    tower, ref = model.tower(name), model.ref
    shape = (3, ref.image.crop, ref.image.crop) if name is TowerName.IMAGE else (ref.text.context_length,)
    artifact = onnx_from_tower(
        tower, sample_of(tower, shape, ref.text.eos_id), recipe.export, weights_digest=edit.edited_weights_digest,
        edits=edit.of(name), patch=patch, folder=folder,
    )  # fmt: skip
    assert artifact.fingerprint.layers == len(tower.layers(recipe.entries.of(name).layers))
    assert not artifact.fingerprint.mismatches
    session = open_graph(folder / artifact.file, artifact, max_batch=PROFILE.max)
    batch = next(iter(pairs_of(model, name)))
    rows = np.concatenate([batch.safe, batch.unsafe])
    if name is TowerName.TEXT:
        captions = ["", "cat", "word " * 200, "一只猫", *(["a cat"] * 3)]
        rows = Tokenizer(model.tokenizer_json, ref.text).encode(captions)
    with torch.inference_mode():
        embeds, *further = (output.numpy() for output in tower.outputs(torch.from_numpy(rows)))
    wanted = [embeds / np.linalg.norm(embeds, axis=1, keepdims=True), *further]
    for size in (1, 2, len(rows)):
        assert np.abs(session.run(rows[:size]) - wanted[0][:size]).max() < 1e-5
        found = session.run_all(rows[:size])
        assert tuple(found) == tower.output_names
        for output, expected in zip(found.values(), wanted, strict=True):
            assert np.abs(output - expected[:size]).max() < 1e-5 * max(1.0, float(np.abs(expected).max()))
    return artifact, rows


@pytest.mark.parametrize("tower", list(TowerName))
@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_those_of_the_published_formulas(name: str, tower: TowerName, tmp_path: Path) -> None:
    """Scores computed from the layer's inputs, sample by sample in float64, select the same entries."""
    model, recipe = model_of(name), reduced(name)
    spec = recipe.entries.of(tower)
    layers = model.tower(tower).layers(spec.layers)
    seen: dict[str, dict[str, list[np.ndarray]]] = {n: {"safe": [], "unsafe": []} for n in layers}

    def keep(layer: str, valid: Any, half: int) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].double().numpy()
            for i, row in enumerate(rows):
                seen[layer]["safe" if i < half else "unsafe"].append(row if valid is None else row[valid[i]])

        return hook

    with torch.inference_mode():
        for batch in pairs_of(model, tower):
            inputs = torch.from_numpy(np.concatenate([batch.safe, batch.unsafe]))
            valid = model.tower(tower).valid_tokens(inputs)
            mask = None if valid is None else valid.numpy()
            hooks = [m.register_forward_pre_hook(keep(n, mask, len(batch.ids))) for n, m in layers.items()]
            model.tower(tower).embed(inputs)
            for hook in hooks:
                hook.remove()
    edits = dataclasses.replace(recipe.entries, towers=(tower,))
    score_to_folder(model, source().record, lambda t: pairs_of(model, t), edits, tmp_path)
    from safetensors.torch import load_file

    fast = load_file(tmp_path / "scores.safetensors")
    for layer, module in layers.items():
        weight = module.weight.detach().double().numpy()
        eps = 1e-8 if tower is TowerName.IMAGE else 0.0
        slow = uwm_oracle.score(seen[layer]["safe"], seen[layer]["unsafe"], weight, spec.rule.value, eps)
        np.testing.assert_allclose(fast[layer].numpy(), slow, rtol=1e-3)
        chosen, wanted = (
            np.isin(np.arange(weight.size), selected_indices(torch.from_numpy(np.asarray(s)), spec.keep_mass).numpy())
            for s in (fast[layer].numpy(), slow)
        )
        assert (chosen == wanted).mean() >= AGREEMENT


def check_lowered(graph: OnnxArtifact, edits: list[TensorEdit], patch: Patch, rows: np.ndarray, folder: Path) -> None:
    """fp16 and INT8 of one exported tower: the edit in it, ONNX Runtime executes it, TensorRT-RTX builds it."""
    source = folder / graph.file
    wanted = embed_with(graph, source, Precision.FP32, [rows])
    ranges = ranges_of(source, {"safe": [rows], "unsafe": [rows]}, folder)
    for precision, cosine in ((Precision.FP16, 0.9999), (Precision.INT8, 0.9)):
        out = folder / f"{graph.tower.value}-{precision.value}"
        out.mkdir()
        lowered = converted(
            graph, folder, out, precision=precision, lowered=precision, patterns=(), layers=(), ranges=ranges,
            edits=edits, patch=patch, canaries=None,
        )  # fmt: skip
        assert lowered.fingerprint.layers == len(edits)
        found = embed_with(lowered, out / lowered.file, precision, [rows])
        assert (found * wanted).sum(1).min() > cosine
        for target in (Target.ONNXRUNTIME, Target.TENSORRT_RTX):
            (out / target.value).mkdir()
            engine = engine_from_onnx(lowered, out, target, PROFILE, edits, out / target.value)
            assert engine.precision == precision


def unedited(model: LoadedModel, name: TowerName, recipe: str) -> list[TensorEdit]:
    """Layers in which nothing is selected."""
    spec = reduced(recipe).entries.of(name)
    return [
        TensorEdit(
            tower=name, name=f"{path}.weight", shape=tuple(layer.weight.shape), selected=0, share=0.0,
            digest_before=digest_of_tensor(layer.weight), digest_after=digest_of_tensor(layer.weight),
        )
        for path, layer in model.tower(name).layers(spec.layers).items()
    ]  # fmt: skip


def no_patch(edits: list[TensorEdit]) -> Patch:
    """A patch that selects nothing."""
    nothing = torch.empty(0, dtype=torch.int32)
    return Patch({
        edit.name: TensorPatch(
            indices=nothing, factor=1.0, digest_before=edit.digest_before, digest_after=edit.digest_after
        )
        for edit in edits
    })  # fmt: skip
