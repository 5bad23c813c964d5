"""Graphs that nvidia-modelopt quantised pass the checks of our own, or are refused like them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.onnx.conftest import Exported
from uwm_deploy.errors import ContractError, PrerequisiteError, RecipeError
from uwm_deploy.graphs.achieved_precision import low_share
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.modelopt import fold_weights, quantised_by_modelopt
from uwm_deploy.graphs.quantise import EightBitType
from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.recipes.shipped import read_toml
from uwm_deploy.records.graph import OnnxArtifact, Precision, Profile, Target
from uwm_deploy.runtime.session import open_engine
from uwm_deploy.safeground.canaries import Canaries
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.convert.convert import converted, embed_with, layer_names

PROFILE = Profile(min=1, opt=2, max=4)
INSTALLED = importlib.util.find_spec("modelopt") is not None
needs_modelopt = pytest.mark.skipif(not INSTALLED, reason="not run: package nvidia-modelopt is not installed")


def rows(exported: Exported, count: int, seed: int = 0) -> np.ndarray:
    return exported.case.inputs(count, seed).numpy()


def quantised(
    exported: Exported,
    folder: Path,
    kind: EightBitType,
    patterns: tuple[str, ...] = (),
    canaries: Canaries | None = None,
) -> OnnxArtifact:
    folder.mkdir(exist_ok=True)
    source = exported.folder / exported.artifact.file
    model, version = quantised_by_modelopt(source, kind, "max", patterns, [rows(exported, 8, 1)], folder)
    precision = Precision(kind)
    return converted(
        exported.artifact, exported.folder, folder, precision=precision, lowered=precision, patterns=patterns, layers=(),
        ranges=None, edits=exported.case.edits, patch=exported.case.patch, canaries=canaries,
        quantised=(model, f"nvidia-modelopt {version}, max"),
    )  # fmt: skip


@needs_modelopt
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_names_edit_and_precision_survive(exported: Exported, tmp_path: Path, kind: EightBitType) -> None:
    """Every weight has its name, the edited ones their signs; layers are 8-bit but for the last, which modelopt leaves."""
    graph = quantised(exported, tmp_path / "out", kind)
    path = tmp_path / "out" / graph.file
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert {name for name, _ in exported.case.tower.graph_module().named_parameters()} <= set(kinds)
    wanted = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}[kind]
    assert {kinds[edit.name] for edit in exported.case.edits} == {wanted}
    assert graph.fingerprint.layers == len(exported.case.edits)
    assert graph.conversion is not None
    last = layer_names(exported.folder / exported.artifact.file)[-1]
    assert graph.conversion.kept == (last,)
    assert graph.conversion.achieved["linear"]["fp32"] == 1
    assert low_share(graph.conversion.achieved, kind) > 0.9
    assert "nvidia-modelopt" in graph.conversion.quantiser
    found = embed_with(graph, path, Precision(kind), [rows(exported, 5)])
    near = embed_with(exported.artifact, exported.folder / exported.artifact.file, Precision.FP32, [rows(exported, 5)])
    assert (found * near).sum(1).min() > 0.97
    left = {file.name for file in (tmp_path / "out").iterdir()}
    stem = exported.artifact.tower.value
    assert left == {graph.file} | {f"{stem}.quantise.{part}" for part in ("json", "log", "result.json")}
    if kind == "int8":
        scale = next(n for n in proto.graph.node if n.input[:1] == [exported.case.edits[0].name]).input[1]
        steps = next(t for t in proto.graph.initializer if t.name == scale)
        assert len(steps.dims) == 1  # one scale per output channel
    else:
        assert quantised(exported, tmp_path / "again", kind).digest == graph.digest


@needs_modelopt
def test_islands_and_canaries(exported: Exported, tmp_path: Path) -> None:
    """Layers can be kept; a graph nearer to the original than to the edited model is refused."""
    layer = exported.case.edits[0].name.removesuffix(".weight")
    graph = quantised(exported, tmp_path / "kept", "int8", (layer,))
    assert graph.conversion is not None
    assert graph.conversion.kept[0] == layer
    assert graph.conversion.achieved["linear"]["fp32"] == 2
    inputs = rows(exported, 4)
    near = embed_with(exported.artifact, exported.folder / exported.artifact.file, Precision.FP32, [inputs])
    other = np.random.default_rng(0).normal(size=near.shape).astype(np.float32)
    with pytest.raises(ContractError, match="worst canary"):
        quantised(exported, tmp_path / "bad", "int8", canaries=Canaries(inputs, near, other))


@needs_modelopt
@pytest.mark.parametrize("target", [Target.ONNXRUNTIME, Target.TENSORRT_RTX])
def test_engines_are_compiled_from_it(exported: Exported, tmp_path: Path, target: Target) -> None:
    """ONNX Runtime multiplies in 8 bits with it; TensorRT-RTX takes it."""
    if target is Target.TENSORRT_RTX:
        pytest.importorskip("tensorrt_rtx")
    graph = quantised(exported, tmp_path / "graph", "int8")
    (tmp_path / "engine").mkdir()
    engine = engine_from_onnx(graph, tmp_path / "graph", target, PROFILE, exported.case.edits, tmp_path / "engine")
    assert engine.precision == "int8"
    if target is Target.ONNXRUNTIME:
        kinds = [node.op_type for node in onnx.load(tmp_path / "engine" / engine.file).graph.node]
        assert "MatMulIntegerToFloat" in kinds
        session = open_engine(engine, (tmp_path / "engine" / engine.file).read_bytes(), {}, device="cpu")
        assert session.run(rows(exported, 3)).shape[0] == 3


def pairs_around(zero: int) -> ir.Model:
    """X times w with Q and DQ around both, the weight with a zero point."""
    tensors = {
        "fc.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
        "ws": np.float32(0.1), "wz": np.int8(zero), "xs": np.float32(0.1), "xz": np.int8(0),
    }  # fmt: skip
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        onnx.helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        onnx.helper.make_node("QuantizeLinear", ["fc.weight", "ws", "wz"], ["wq"]),
        onnx.helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"]),
        onnx.helper.make_node("MatMul", ["xd", "wd"], ["y"], name="fc"),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["b", k]) for n, k in (("x", 4), ("y", 3))]
    held = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]))


def test_folding_keeps_the_values_and_the_name() -> None:
    """The weight is the 8-bit one under its own name, and behind its DQ what it was."""
    model = pairs_around(0)
    fold_weights(model, "int8")
    assert sorted(node.op_type for node in model.graph) == ["DequantizeLinear"] * 2 + ["MatMul", "QuantizeLinear"]
    weight = model.graph.initializers["fc.weight"].const_value
    assert weight is not None
    assert np.array_equal(weight.numpy(), np.minimum(np.arange(12).reshape(4, 3) * 10, 127))
    assert not linear_layers(model)
    with pytest.raises(ContractError, match=r"fc\.weight has a zero point"):
        fold_weights(pairs_around(3), "int8")


def test_auto_is_refused(tmp_path: Path) -> None:
    """The search of auto quantises by itself, so the recipe contradicts itself; said before anything is loaded."""
    text, _ = read_toml("export", "demo")
    text = text.replace("[compile]\n", '[compile]\nquantiser = "modelopt-max"\n')
    (tmp_path / "demo.toml").write_text(text, encoding="utf-8")
    asked = Request(model=str(tmp_path / "demo.toml"), precisions=("int8",))
    assert resolved_recipe(asked).compile.quantiser == "modelopt-max"
    with pytest.raises(RecipeError, match="modelopt-max with precision auto"):
        resolved_recipe(Request(model=str(tmp_path / "demo.toml"), precisions=("auto",)))


@pytest.mark.skipif(INSTALLED, reason="nvidia-modelopt is installed here")
def test_missing_package_is_a_prerequisite(exported: Exported, tmp_path: Path) -> None:
    """The error names what to install; nothing is written."""
    source = exported.folder / exported.artifact.file
    with pytest.raises(PrerequisiteError, match=r"nvidia-modelopt is not installed.*quantize"):
        quantised_by_modelopt(source, "int8", "max", (), [rows(exported, 4)], tmp_path)
    assert not list(tmp_path.iterdir())
