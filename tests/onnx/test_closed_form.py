"""Closed-form steps through every family, from the fit to ONNX Runtime: a graph computes what the fit's own maps compute."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from tests.families import reduced
from uwm_deploy.data.demo.source import DemoSource
from uwm_deploy.edits.applied import select_and_apply
from uwm_deploy.edits.axis import maps_of
from uwm_deploy.edits.closed_form import features_in_place, fitted_weights, placement_of
from uwm_deploy.edits.fit_files import read_sums
from uwm_deploy.edits.leace import leace_maps
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.edits.patch import Patch
from uwm_deploy.edits.solving import solver
from uwm_deploy.errors import InputError
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.edit_spec import AxisSpec, StepSpec
from uwm_deploy.recipes.recipe import Recipe
from uwm_deploy.recipes.resolve import calibration_set_of, recipe_of
from uwm_deploy.records.edit import MAP_NAMES, EditRecord, Method, Placement
from uwm_deploy.records.graph import OnnxArtifact, Precision, Profile, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.runtime.session import open_graph
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.convert.convert import converted, embed_with, ranges_of
from uwm_deploy.stages.edit.edit import edit_to_folder
from uwm_deploy.stages.export import onnx_from_tower
from uwm_deploy.stages.fit import fit_to_folder
from uwm_deploy.stages.score.score import score_to_folder
from uwm_deploy.stages.traced import sample_of
from uwm_deploy.towers.embedding_map import has_map
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel

SETTING = AxisSetting(g=0.5, o=0.5, kappa=0.2, a=1.0, tau=0.5)
PROFILE = Profile(min=1, opt=2, max=5)
PAIRS = 24
CLOSE = 1e-5

Load = Callable[[Path], tuple[Recipe, LoadedModel]]
PlacementSpec = Literal["auto", "weights", "embedding"]


# --- small models of every kind -------------------------------------------------------------------------------------


def shipped(name: str) -> Load:
    """A recipe at reduced size, with one layer per tower."""

    def load(_: Path) -> tuple[Recipe, LoadedModel]:
        recipe = reduced(name)
        whole = recipe.model.architecture
        assert whole is not None
        one = {"num_hidden_layers": 1}
        small = dataclasses.replace(whole, text={**whole.text, **one}, image={**whole.image, **one})
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, architecture=small))
        return recipe, load_model(recipe, folder=None, weights="random", device="cpu")

    return load


_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1}
_VISION = {"image_size": 28, "layers": 1, "width": 32, "head_width": 8, "patch_size": 14}
_COCA = {
    "vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
    "text_cfg": {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**_TEXT, "attn_pooler_heads": 4},
    "custom_text": True,
}


def open_clip(**config: Any) -> Load:
    """A tiny configuration of open_clip, whose embeddings are narrower than what is projected, as those of real ones."""
    config_file = "open_clip_config.json"

    def load(folder: Path) -> tuple[Recipe, LoadedModel]:
        parts = {key: base | config.get(key, {}) for key, base in (("text_cfg", _TEXT), ("vision_cfg", _VISION))}
        body = {"model_cfg": {"embed_dim": 24} | config | parts, "preprocess_cfg": {}}
        (folder / "source").mkdir()
        (folder / "source" / config_file).write_text(json.dumps(body))
        recipe = reduced("coca-vit-b32" if "multimodal_cfg" in config else "open-clip-vit-b32")
        return recipe, load_model(recipe, folder=folder / "source", weights="random", device="cpu")

    return load


def demo(_: Path) -> tuple[Recipe, LoadedModel]:
    """The trained model: random towers embed all pictures nearly alike, and 8 bits do not tell them apart."""
    recipe, _ = recipe_of("demo")
    return recipe, load_model(recipe, folder=resources.checkpoint_folder("shipped:demo", ""), device="cpu")


BOTH: dict[str, Load] = {
    "hf-clip": shipped("clip-vit-l14"),
    "open-clip": open_clip(),
    "open-clip-linear": open_clip(text_cfg={"proj_bias": True}),
    "open-clip-custom-linear": open_clip(text_cfg={"proj_bias": True}, custom_text=True),
    "coca": open_clip(**_COCA),
}
"""Kinds of models that have both placements."""

CASES = [
    *((kind, Placement.WEIGHTS) for kind in BOTH),
    ("hf-clip", Placement.EMBEDDING),
    *(pytest.param(kind, Placement.EMBEDDING, marks=pytest.mark.slow) for kind in ("open-clip", "coca")),
]
"""How a projection is written makes no difference behind the embedding: nor does the library, as a SigLIP shows below."""

BEHIND: dict[str, Load] = {"siglip": shipped("siglip-base"), "siglip2": shipped("siglip2-base")}
"""Kinds without a linear map at the end."""


# --- the chain ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """One edited model with what it must compute, and what it was before the step."""

    recipe: Recipe
    edit: EditRecord
    edited: LoadedModel
    inputs: dict[TowerName, np.ndarray]
    wanted: dict[TowerName, np.ndarray]
    before: dict[TowerName, np.ndarray]
    folder: Path


def source() -> DemoSource:
    return DemoSource(dataclasses.replace(calibration_set_of("demo")[0], limit=PAIRS))


def pairs_of(model: LoadedModel, name: TowerName, *, full_length: bool = False) -> PairStream:
    return PairStream(
        source(), name, model.ref.image, Tokenizer(model.tokenizer_json, model.ref.text),
        batch_pairs=8, workers=0, max_broken_share=0.0, progress=lambda *_: None, sort_by_length=not full_length,
    )  # fmt: skip


def rows_of(model: LoadedModel, name: TowerName) -> np.ndarray:
    """Inputs that the fit did not see in this form: captions of any length, noise beside pictures."""
    if name is TowerName.TEXT:
        captions = ["", "cat", "word " * 200, "一只猫", "a fire near a red circle"]
        return Tokenizer(model.tokenizer_json, model.ref.text).encode(captions)
    batch = next(iter(pairs_of(model, name)))
    noise = np.random.default_rng(0).standard_normal(batch.safe[:2].shape).astype(np.float32)
    return np.concatenate([batch.safe[:2], batch.unsafe[:1], noise])


def with_step(recipe: Recipe, method: Method, placement: PlacementSpec, *, after_uwm: bool = False) -> Recipe:
    setting = SETTING if method is Method.SAFETY_AXIS else None
    step = StepSpec(method=method, axis=AxisSpec(placement=placement, setting=setting))
    return dataclasses.replace(recipe, edit=(*(recipe.edit if after_uwm else ()), step))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def chain(load: Load, method: Method, placement: PlacementSpec, folder: Path, *, after_uwm: bool = False) -> Chain:
    """Fit, solve, edit, save, load; what it must compute is taken from the fit's sums and the model before the step."""
    recipe, model = load(folder)
    recipe = with_step(recipe, method, placement, after_uwm=after_uwm)
    entries, spec = recipe.entries, recipe.closed_form
    assert spec is not None
    scores = folder / "scores.safetensors"
    score = score_to_folder(model, source().record, lambda t: pairs_of(model, t), entries, folder)
    before, original = model, None
    if after_uwm:
        (folder / "again").mkdir()
        before, original = load(folder / "again")[1], model
        select_and_apply(before, score, scores, entries)
    place, _ = placement_of(before, spec)
    concepts = dict(zip(source().ids, source().concepts, strict=True))
    streams = lambda tower: pairs_of(model, tower)  # noqa: E731 -- a stream per tower, as the stage wants it
    fit = fit_to_folder(before, original, source().record, streams, concepts, {}, method, place, folder)
    weights, sums = fitted_weights(before, place), read_sums(folder, fit)
    maps = leace_maps(sums, weights) if method is Method.LEACE else maps_of(sums, weights, SETTING).maps
    inputs, wanted, unmapped = {tower: rows_of(model, tower) for tower in TowerName}, {}, {}
    for tower in TowerName:
        rows = torch.from_numpy(inputs[tower])
        with torch.inference_mode(), features_in_place(before, tower, place) as features:
            wanted[tower] = unit(maps[tower].apply(features(rows).numpy()))
        with torch.inference_mode():
            unmapped[tower] = unit(before.tower(tower).embed(rows).numpy())
    edit = edit_to_folder(model, score, scores, entries, folder, solver(spec, fit, folder, lambda _: None))
    edited = load_model(recipe, folder=folder / "model", device="cpu")
    assert edited.ref.weights_digest == edit.edited_weights_digest
    return Chain(recipe, edit, edited, inputs, wanted, unmapped, folder)


def exported(made: Chain, name: TowerName) -> OnnxArtifact:
    tower, ref = made.edited.tower(name), made.edited.ref
    shape = (3, ref.image.crop, ref.image.crop) if name is TowerName.IMAGE else (ref.text.context_length,)
    artifact = onnx_from_tower(
        tower, sample_of(tower, shape, ref.text.eos_id), made.recipe.export,
        weights_digest=made.edit.edited_weights_digest, edits=made.edit.of(name), patch=patch_of(made),
        folder=made.folder,
    )  # fmt: skip
    assert not artifact.fingerprint.mismatches
    assert artifact.fingerprint.layers == len(made.edit.of(name))
    return artifact


def patch_of(made: Chain) -> Patch:
    return Patch.from_file(made.folder / "patch.safetensors")


def check_graphs(made: Chain) -> None:
    """Both graphs in ONNX Runtime, alone and in batches, against the maps."""
    for name in TowerName:
        artifact = exported(made, name)
        session = open_graph(made.folder / artifact.file, artifact, max_batch=PROFILE.max)
        rows, wanted = made.inputs[name], made.wanted[name]
        for size in (1, 2, len(rows)):
            assert np.abs(session.run(rows[:size]) - wanted[:size]).max() < CLOSE
        session.close()


def changed(made: Chain) -> set[str]:
    return {tensor.name for tensor in made.edit.tensors if tensor.changed}


@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_a_family_with_a_last_map_has_both_placements(kind: str, placement: Placement, tmp_path: Path) -> None:
    """The graph is the fit's own map; in the weights it needs no new node, behind the embedding it is one of its own."""
    made = chain(BOTH[kind], Method.SAFETY_AXIS, placement.value, tmp_path)
    check_graphs(made)
    assert made.edit.placement is placement
    maps = {f"{MAP_NAMES[t]}.{part}" for t in TowerName for part in ("weight", "bias")}
    assert len(changed(made)) == 4
    assert (changed(made) == maps) is (placement is Placement.EMBEDDING)
    assert all(has_map(made.edited.tower(t)) is (placement is Placement.EMBEDDING) for t in TowerName)
    if kind.endswith("linear") and placement is Placement.WEIGHTS:
        assert any(name.endswith("text_projection.bias") for name in changed(made))


@pytest.mark.parametrize("kind", BEHIND)
def test_a_family_without_a_last_map_gets_maps_behind_its_embeddings(kind: str, tmp_path: Path) -> None:
    """`auto` takes that placement and says why; the other one is refused with what to do."""
    recipe, model = BEHIND[kind](tmp_path)
    spec = with_step(recipe, Method.SAFETY_AXIS, "auto").closed_form
    assert spec is not None
    placement, why = placement_of(model, spec)
    assert placement is Placement.EMBEDDING
    assert "tower does not end with a LayerNorm and a linear map" in why
    refused = with_step(recipe, Method.SAFETY_AXIS, "weights").closed_form
    assert refused is not None
    with pytest.raises(InputError, match="use --placement embedding"):
        placement_of(model, refused)
    check_graphs(chain(BEHIND[kind], Method.SAFETY_AXIS, "auto", tmp_path))


def test_the_weights_come_first_where_they_can(tmp_path: Path) -> None:
    """`auto` on a CLIP, which says that no node is added."""
    recipe, model = BOTH["hf-clip"](tmp_path)
    spec = with_step(recipe, Method.SAFETY_AXIS, "auto").closed_form
    assert spec is not None
    assert placement_of(model, spec) == (Placement.WEIGHTS, "placement weights: no new node in the graphs")


def test_a_map_into_more_dimensions_holds_no_constant() -> None:
    """A bias-free projection that widens is refused in the weights, and `auto` goes behind the embedding."""
    recipe = reduced("open-clip-vit-b32")  # from 64 to 512 dimensions
    model = load_model(recipe, folder=None, weights="random", device="cpu")
    spec = with_step(recipe, Method.SAFETY_AXIS, "weights").closed_form
    assert spec is not None
    with pytest.raises(InputError, match=r"64 .*512 .*--placement embedding"):
        placement_of(model, spec)


@pytest.mark.parametrize(
    ("method", "placement"),
    [
        (Method.SAFETY_AXIS, Placement.WEIGHTS),
        (Method.SAFETY_AXIS, Placement.EMBEDDING),
        (Method.LEACE, Placement.WEIGHTS),
    ],
)
def test_steps_follow_each_other(method: Method, placement: Placement, tmp_path: Path) -> None:
    """After UWM the step is fitted on what UWM left, and the saved model has both."""
    made = chain(BOTH["hf-clip"], method, placement.value, tmp_path, after_uwm=True)
    check_graphs(made)
    assert made.edit.methods == (Method.UWM, method)
    assert len(changed(made)) > 4


# --- lower precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", list(Placement))
def test_lower_precision_keeps_the_step(placement: Placement, tmp_path: Path) -> None:
    """fp16 and INT8 hold the edit, and ONNX Runtime runs them; a map behind the embedding stays float32 to the bit."""
    made = chain(demo, Method.SAFETY_AXIS, placement.value, tmp_path)
    for name in TowerName:
        artifact, edits = exported(made, name), made.edit.of(name)
        batch = next(iter(pairs_of(made.edited, name, full_length=True)))
        ranges = ranges_of(tmp_path / artifact.file, {"safe": [batch.safe], "unsafe": [batch.unsafe]}, tmp_path)
        patterns = (MAP_NAMES[name],) if placement is Placement.EMBEDDING else ()
        for precision, most in ((Precision.FP16, 0.01), (Precision.INT8, 0.25)):
            out = tmp_path / f"{name.value}-{precision.value}"
            (out / "engine").mkdir(parents=True)
            lowered = converted(
                artifact, tmp_path, out, precision=precision, lowered=precision, patterns=patterns, layers=(),
                ranges=ranges, edits=edits, patch=patch_of(made), canaries=None,
            )  # fmt: skip
            assert lowered.fingerprint.layers == len(edits)
            found = embed_with(lowered, out / lowered.file, precision, [made.inputs[name]])
            moved = np.linalg.norm(made.wanted[name] - made.before[name], axis=1)
            assert (np.linalg.norm(found - made.wanted[name], axis=1) / moved).max() < most
            if placement is Placement.EMBEDDING:
                check_map_is_float32(out / lowered.file, name, made)
            engine = engine_from_onnx(lowered, out, Target.ONNXRUNTIME, PROFILE, edits, out / "engine")
            assert engine.precision == precision


def check_map_is_float32(file: Path, tower: TowerName, made: Chain) -> None:
    """Its tensors are the edited model's own, and what multiplies and adds them has float32 on both sides."""
    model = onnx.shape_inference.infer_shapes(onnx.load(file))
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = {
        f"{MAP_NAMES[tower]}.{part}": p.detach().numpy() for part, p in made.edited.maps[tower].named_parameters()
    }
    turned = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in ("Transpose", "Identity")}
    for name, array in wanted.items():
        assert np.array_equal(numpy_helper.to_array(tensors[name]), array)
        users = [n for n in model.graph.node if name in (*n.input, *(turned.get(i, i) for i in n.input))]
        reads = [node for node in users if node.op_type not in ("Transpose", "Identity")]
        assert reads
        for node in reads:
            assert node.op_type in ("MatMul", "Gemm", "Add")
            inputs = [kinds.get(i) or tensors[i].data_type for i in node.input]
            assert {*inputs, kinds[node.output[0]]} == {onnx.TensorProto.FLOAT}
