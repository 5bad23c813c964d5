"""Graphs that take crops of 8 bits: what they do to them, what stays in them, and that no other input gets through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from tests.onnx.conftest import SIDE, Case, Exported, make_edited, make_trained
from tests.reports import report
from uwm_deploy.bundle.tied import check_rows
from uwm_deploy.errors import ContractError, IntegrityError
from uwm_deploy.graphs.constant_folding import computed_away
from uwm_deploy.graphs.lowered import lowered_graph
from uwm_deploy.graphs.passes import simplify
from uwm_deploy.graphs.pixels import take_crops
from uwm_deploy.graphs.tracing import graph_from_module
from uwm_deploy.graphs.write import write_graph
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.graph import Conversion, Normalisation, OnnxArtifact, Precision, Profile, Target, TensorSpec
from uwm_deploy.records.model import ImageSpec, TowerName
from uwm_deploy.runtime.image import pixels_from_crops
from uwm_deploy.runtime.pixels import crops_from_pixels, taken
from uwm_deploy.runtime.session import open_engine, open_graph
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.convert.calibrate import chosen_for
from uwm_deploy.stages.convert.convert import embed_with, lower, ranges_of
from uwm_deploy.stages.verify.audit import audit_of_engine, audit_of_graph

CLIP = Normalisation(rescale=1 / 255, mean=(0.4814, 0.4578, 0.4082), std=(0.2686, 0.2613, 0.2757))
SIGLIP = Normalisation(rescale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PROFILE = Profile(min=1, opt=2, max=4)


def image_spec(by: Normalisation, side: int = SIDE) -> ImageSpec:
    return ImageSpec(resize=side, crop=side, resample="bicubic", rescale=by.rescale, mean=by.mean, std=by.std)


def crops(rows: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, side, side, 3), dtype=np.uint8)


# --- stems ------------------------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """Something that begins with a convolution, in the way of one family."""

    def __init__(self, first: nn.Module, *, also: bool = False) -> None:
        super().__init__()
        self.first, self.also = first, also

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 8, 8) to (B, d)."""
        found = self.first(pixels).flatten(1)
        return torch.cat([found, pixels.mean((2, 3))], 1) if self.also else found


class Patches(nn.Module):
    """Patches cut out by hand and multiplied by a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 8, 8) to (B, 4, 5)."""
        parts = pixels.reshape(-1, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5)
        found: Tensor = self.linear(parts.reshape(-1, 4, 48))
        return found


STEMS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "patches without a bias, CLIP": (lambda: Stem(nn.Conv2d(3, 6, 4, 4, bias=False)), True),
    "patches with a bias, SigLIP": (lambda: Stem(nn.Conv2d(3, 6, 4, 4)), True),
    "padding by name, valid": (lambda: Stem(nn.Conv2d(3, 6, 4, 4, padding="valid")), True),
    "ConvNeXt: four by four, then more": (lambda: Stem(nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.GELU())), True),
    "ResNet: padded": (lambda: Stem(nn.Conv2d(3, 6, 3, 2, 1, bias=False)), False),
    "padded at one side": (lambda: Stem(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 0)), nn.Conv2d(3, 6, 3, 2))), False),
    "padding by name, same": (lambda: Stem(nn.Conv2d(3, 6, 3, padding="same")), False),
    "one kernel per channel": (lambda: Stem(nn.Conv2d(3, 6, 2, 2, groups=3)), False),
    "pixels are read twice": (lambda: Stem(nn.Conv2d(3, 6, 4, 4), also=True), False),
    "no convolution at all": (Patches, False),
}
"""Stem, and whether its convolution takes up the normalisation."""


@pytest.mark.parametrize("by", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("name", STEMS)
def test_a_stem_takes_crops(name: str, by: Normalisation, tmp_path: Path) -> None:
    """What comes out is what comes out of normalised pixels; whether the convolution takes it up follows from the graph."""
    torch.manual_seed(0)
    made, folded = STEMS[name]
    module = made().eval()
    weights = {key for key, _ in module.named_parameters()}
    model = graph_from_module(module, torch.randn(2, 3, 8, 8), opset=20, input_name="pixels", output_names=["found"])
    simplify(model, weights)
    take_crops(model, by, weights)
    write_graph(model, tmp_path / "stem.onnx", "")
    onnx.checker.check_model(onnx.load(tmp_path / "stem.onnx"), full_check=True)
    rows = crops(3, 8)
    given = TensorSpec(name="pixels", dtype="uint8", shape=("batch", 8, 8, 3), normalisation=by)
    kinds = {node.name for node in model.graph}
    assert ("pixels.weight" in kinds, "pixels.normalised" in kinds) == (folded, not folded)
    found = run(tmp_path / "stem.onnx", given, rows)
    exact = (rows.astype(np.float64) * by.rescale - np.array(by.mean)) / np.array(by.std)
    wanted = module.double()(torch.from_numpy(exact.transpose(0, 3, 1, 2))).detach().numpy()
    assert np.abs(found - wanted).max() < 2e-6 * np.abs(wanted).max()
    for key, parameter in module.float().named_parameters():  # nothing is multiplied into a weight
        assert np.array_equal(model.graph.initializers[key].const_value.numpy(), parameter.detach().numpy())


def run(path: Path, given: TensorSpec, rows: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {given.name: rows})[0]
    return found


def test_what_is_no_batch_of_images_is_refused() -> None:
    """Ids, and images of one channel, have no mean of three."""
    module = Stem(nn.Conv2d(1, 2, 4, 4)).eval()
    model = graph_from_module(module, torch.randn(2, 1, 8, 8), opset=20, input_name="grey", output_names=["found"])
    with pytest.raises(ContractError, match="three channels"):
        take_crops(model, CLIP, set())


# --- towers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[make_edited, make_trained], ids=["edited", "trained"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An image tower that takes crops; trained, its stem is edited, too."""
    case: Case = request.param(TowerName.IMAGE)
    folder = tmp_path_factory.mktemp("crops")
    return Exported(case, case.export(folder, normalisation=CLIP), folder)


def wanted_of(exported: Exported, rows: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(pixels_from_crops(rows, image_spec(CLIP)))
    found = exported.case.tower.embed(pixels).detach()
    return (found / found.norm(dim=1, keepdim=True)).numpy()


def test_a_tower_takes_crops_and_keeps_every_weight(exported: Exported) -> None:
    """The record says what the graph takes, the audit finds every weight bit for bit, and both kinds of rows embed alike."""
    graph, path = exported.artifact, exported.folder / exported.artifact.file
    given = graph.inputs[0]
    assert (given.name, given.dtype, given.shape) == ("pixel_values", "uint8", ("batch", SIDE, SIDE, 3))
    assert given.normalisation == CLIP
    assert record_from_json(OnnxArtifact, json_from_record(graph), where="graph") == graph
    audit = audit_of_graph(path, exported.case.tower.graph_module(), exported.case.edits, exported.case.patch)
    assert (audit.edit, audit.differ, audit.layers) == ((), (), len(exported.case.edits))
    session, rows = open_graph(path, graph, max_batch=4), crops(3)
    assert np.abs(session.run(rows) - wanted_of(exported, rows)).max() < 1e-5
    assert np.array_equal(session.run(pixels_from_crops(rows, image_spec(CLIP))), session.run(rows))
    with pytest.raises(ContractError, match=r"uint8 or .* float32, not .* int64"):
        session.run(rows.astype(np.int64))


def test_a_compiler_folds_the_scale_into_the_stem(exported: Exported, tmp_path: Path) -> None:
    """ONNX Runtime's own graph has one convolution and its constants left; the edit is found in it all the same."""
    graph = exported.artifact
    engine = engine_from_onnx(graph, exported.folder, Target.ONNXRUNTIME, PROFILE, exported.case.edits, tmp_path)
    assert engine.inputs == graph.inputs
    nodes = onnx.load(tmp_path / engine.file).graph.node
    before_conv = [node.op_type for node in nodes if node.name.startswith("pixels.")]
    assert before_conv == ["Cast", "Transpose"]
    source = exported.folder / graph.file
    stem = "vision_model.embeddings.patch_embedding.weight"
    assert stem in computed_away(source)
    audit = audit_of_engine(tmp_path / engine.file, source, Precision.FP32, exported.case.edits, exported.case.patch)
    assert audit.edit == ()
    rows = crops(3)
    session = open_engine(engine, (tmp_path / engine.file).read_bytes(), {}, device="cpu")
    assert np.abs(session.run(rows) - wanted_of(exported, rows)).max() < 1e-5


def test_another_edit_of_the_stem_is_found(tmp_path: Path) -> None:
    """The weight that is multiplied is the one that is compared: the unedited one is a mismatch."""
    case = make_trained(TowerName.IMAGE)
    stem = "vision_model.embeddings.patch_embedding.weight"
    graph = case.export(tmp_path, normalisation=CLIP)
    proto = onnx.load(tmp_path / graph.file)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == stem)
    weight.CopyFrom(onnx.numpy_helper.from_array(case.before[stem].numpy(), stem))
    onnx.save(proto, tmp_path / "unedited.onnx")
    audit = audit_of_graph(tmp_path / "unedited.onnx", case.tower.graph_module(), case.edits, case.patch)
    assert audit.edit == (f"{stem}: holds the unedited weight",)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_pixels_stay_in_float32_in_every_precision(exported: Exported, tmp_path: Path, precision: Precision) -> None:
    """255 levels and their scale would lose digits; embeddings are those of the model."""
    path = exported.folder / exported.artifact.file
    model, _ = lowered_graph(path, precision, (), {})
    types = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert {types[name] for name in ("pixels.levels", "pixels.weight", "pixels.offset")} == {ir.DataType.FLOAT}
    if precision is Precision.BF16:  # which the CPU does not execute
        return
    write_graph(model, tmp_path / "low.onnx", "")
    session = open_graph(tmp_path / "low.onnx", exported.artifact, max_batch=4)
    rows = crops(3)
    assert (session.run(rows) * wanted_of(exported, rows)).sum(1).min() > 0.999


def test_int8_is_calibrated_on_crops(exported: Exported, tmp_path: Path) -> None:
    """Ranges, channels and codes are chosen on what the graph takes; floats are refused, not cut to bytes."""
    path = exported.folder / exported.artifact.file
    batches = {"safe": [crops(4, seed=1), crops(4, seed=2)], "unsafe": [crops(4, seed=3), crops(4, seed=4)]}
    ranges = ranges_of(path, batches, tmp_path)
    every = [*batches["safe"], *batches["unsafe"]]
    ranges = dataclasses.replace(ranges, chosen=chosen_for(path, (), _vectors(exported), every, tmp_path))
    model, _ = lower(path, Precision.INT8, (), (), ranges)
    write_graph(model, tmp_path / "low.onnx", "")
    rows = crops(3)
    found = embed_with(exported.artifact, tmp_path / "low.onnx", Precision.INT8, [rows])
    assert (found * wanted_of(exported, rows)).sum(1).min() > 0.97
    with pytest.raises(TypeError, match="same_kind"):
        ranges_of(path, {"safe": [np.zeros((4, 3, SIDE, SIDE), np.float32)], "unsafe": batches["unsafe"]}, tmp_path)


def _vectors(exported: Exported) -> set[str]:
    return {edit.name for edit in exported.case.edits if len(edit.shape) < 2}


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
def test_tensorrt_rtx_takes_crops(exported: Exported, tmp_path: Path, precision: Precision) -> None:
    """A network input of 8 bits that is cast first; built ahead of time, on a machine without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    graph, folder = exported.artifact, exported.folder
    if precision is not Precision.FP32:
        folder = tmp_path
        model, _ = lowered_graph(exported.folder / graph.file, precision, (), {})
        made = Conversion(
            precision=precision, lowered=precision, source_digest="", kept=(), achieved={}, clamped=0, zeroed=0
        )
        graph = dataclasses.replace(graph, digest=write_graph(model, tmp_path / graph.file, ""), conversion=made)
    (tmp_path / "engine").mkdir()
    engine = engine_from_onnx(graph, folder, Target.TENSORRT_RTX, PROFILE, exported.case.edits, tmp_path / "engine")
    assert engine.inputs[0].dtype == "uint8"


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [CLIP, SIGLIP, Normalisation(rescale=1 / 127.5, mean=(1, 1, 1), std=(1, 1, 1))])
def test_normalised_pixels_go_back_to_every_level(by: Normalisation) -> None:
    """All 256 levels of every channel."""
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), (1, 16, 16, 3))
    assert np.array_equal(crops_from_pixels(pixels_from_crops(levels, image_spec(by, 16)), by), levels)


def test_rows_that_a_graph_does_not_take_are_refused() -> None:
    """Floats would become bytes without a word, and crops would be taken for pixels."""
    plain = TensorSpec(name="x", dtype="uint8", shape=("batch", 2, 2, 3))
    with pytest.raises(ContractError, match=r"uint8, not .* float32"):
        taken(np.zeros((1, 3, 2, 2), np.float32), plain)
    assert taken(np.ones((1, 4), np.int64), TensorSpec(name="x", dtype="int32", shape=("batch", 4))).dtype == np.int32


def test_a_graph_that_normalises_otherwise_than_the_manifest_is_refused() -> None:
    """A changed mean in either of the two places would change every embedding."""
    model = report(64).model
    model = dataclasses.replace(model, image=image_spec(CLIP), embed_dim=8)
    graph = make_record(CLIP)
    check_rows(model, graph)
    for other in (dataclasses.replace(CLIP, mean=SIGLIP.mean), dataclasses.replace(CLIP, rescale=1.0), None):
        given = dataclasses.replace(graph.inputs[0], normalisation=other)
        with pytest.raises(IntegrityError, match="normalise"):
            check_rows(model, dataclasses.replace(graph, inputs=(given,)))


def make_record(by: Normalisation) -> OnnxArtifact:
    from uwm_deploy.records.graph import Fingerprint

    return OnnxArtifact(
        tower=TowerName.IMAGE,
        file="image.onnx",
        external_data="",
        digest="",
        weights_digest="",
        opset=20,
        inputs=(TensorSpec(name="pixel_values", dtype="uint8", shape=("batch", SIDE, SIDE, 3), normalisation=by),),
        outputs=(TensorSpec(name="embeds", dtype="float32", shape=("batch", 8)),),
        normalised=True,
        versions={},
        fingerprint=Fingerprint(layers=0, entries=0, mismatches=()),
    )
