"""Attention as one node: the same numbers and weights as in steps, where it is known to be right and found to be faster."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.families import FAMILIES, model_of, reduced
from tests.onnx.conftest import Exported
from tests.onnx.test_precision import convert
from tests.onnx.test_refit_weights import swap_back
from tests.onnx.test_structure import CLEAN, _after
from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.attention import Fused, fuse_attention, fused_file, is_fused
from uwm_deploy.graphs.builder_log import BuildFailed
from uwm_deploy.graphs.write import write_graph
from uwm_deploy.pipeline.refit_graphs import refit_engine, refit_graph
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, Precision, Profile, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.session import Session, open_engine
from uwm_deploy.stages.attention import Way, decide, engine_by_measurement
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.convert.convert import embed_with
from uwm_deploy.stages.traced import sample_for, traced
from uwm_deploy.stages.verify.anew import compiled_anew

PROFILE = Profile(min=1, opt=2, max=4)
ONE_ROW = ("siglip-base", "siglip2-base")
"""Families whose image tower ends with an attention of one query row."""

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="not run: package tensorrt_rtx is not installed"
)


def steps_of(exported: Exported) -> ir.Model:
    return ir.load(exported.folder / exported.artifact.file)


def answers(model: ir.Model, rows: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {proto.graph.input[0].name: rows})[0]
    return found


def weights_of(model: ir.Model) -> dict[str, bytes]:
    found = model.graph.initializers.items()
    return {name: value.const_value.tobytes() for name, value in found if value.const_value.size > 64}


@pytest.mark.parametrize("tower", list(TowerName))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_one_node_for_each_attention(family: str, tower: TowerName) -> None:
    """The same embeddings, and every weight as it was; a pooling head with one query row stays as it is."""
    model, spec = model_of(family), ExportSpec(opset=reduced(family).export.opset)
    part = model.tower(tower)
    sample = sample_for(part, model.ref, spec)
    graph = traced(part, sample, spec)
    softmaxes = sum(node.op_type == "Softmax" for node in graph.graph)
    wanted, weights = answers(graph, sample.numpy()), weights_of(graph)
    rest = int(family in ONE_ROW and tower is TowerName.IMAGE)
    assert fuse_attention(graph) == Fused(nodes=softmaxes - rest, one_row=rest)
    kinds = [node.op_type for node in graph.graph]
    assert (kinds.count("Attention"), kinds.count("Softmax")) == (softmaxes - rest, rest)
    assert kinds.count("Attention") >= 2
    assert np.abs(answers(graph, sample.numpy()) - wanted).max() < 1e-5
    assert weights_of(graph) == weights


def test_numbers_depend_on_the_scale_and_the_mask(exported: Exported) -> None:
    """So that the comparison above can fail: another scale, or no mask, gives other embeddings."""
    rows = exported.case.inputs(3).numpy()
    wanted, graph = answers(steps_of(exported), rows), steps_of(exported)
    fuse_attention(graph)
    for node in graph.graph:
        if node.op_type == "Attention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 9.0)
    assert np.abs(answers(graph, rows) - wanted).max() > 1e-4


def test_what_only_looks_like_attention_stays(exported: Exported) -> None:
    """Weights that something else reads too, a softmax over another axis, logits behind one more operator."""
    whole = fuse_attention(steps_of(exported)).nodes
    for change in (_read_twice, _over_queries, _one_more):
        graph = steps_of(exported)
        change(next(node for node in graph.graph if node.op_type == "Softmax"))
        assert fuse_attention(graph).nodes == whole - 1, change


def _read_twice(softmax: ir.Node) -> None:
    assert softmax.graph is not None
    copy = ir.node("Identity", [softmax.outputs[0]], name="copy")
    softmax.graph.insert_after(softmax, copy)


def _over_queries(softmax: ir.Node) -> None:
    softmax.attributes["axis"] = ir.AttrInt64("axis", 2)


def _one_more(softmax: ir.Node) -> None:
    assert softmax.graph is not None
    logits = softmax.inputs[0]
    assert logits is not None
    less = ir.node("Tanh", [logits], name="less")
    less.outputs[0].shape, less.outputs[0].dtype = logits.shape, logits.dtype
    softmax.graph.insert_before(softmax, less)
    softmax.replace_input_with(0, less.outputs[0])


def test_a_file_is_fused_without_its_weights_being_touched(text_export: Exported, tmp_path: Path) -> None:
    """Weights beside the graph stay there; a graph without attention is refused."""
    source = text_export.folder / text_export.artifact.file
    before = onnx.load(source, load_external_data=False).graph.initializer
    model, found = fused_file(source)
    assert found.nodes == 2
    assert [t.SerializeToString() for t in model.graph.initializer] == [
        t.SerializeToString() for t in before if t.name in {n.name for n in model.graph.initializer}
    ]
    assert model.opset_import[0].version >= 23
    write_graph(traced_without_attention(), tmp_path / "plain.onnx")
    with pytest.raises(BuildFailed, match=r"plain\.onnx has no attention"):
        fused_file(tmp_path / "plain.onnx")


def traced_without_attention() -> ir.Model:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 4]))
    node = ir.node("Softmax", [value], name="softmax")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, value.shape
    return ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20}, name="plain"), ir_version=10)


def built(
    exported: Exported, folder: Path, way: Way, precision: Precision = Precision.FP32, target: Target = Target.ONNXRUNTIME
) -> tuple[EngineArtifact, OnnxArtifact, Path]:
    """An engine, and the graph that it was made from."""
    graph, source = exported.artifact, exported.folder
    if precision is not Precision.FP32:
        graph, source = convert(exported, folder / "low", precision), folder / "low"
    (folder / way).mkdir(parents=True)
    engine = engine_from_onnx(graph, source, target, PROFILE, exported.case.edits, folder / way, attention=way)
    return engine, graph, source / graph.file


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.INT8, Precision.W8A16])
def test_every_precision_is_fused_where_it_is_compiled(exported: Exported, tmp_path: Path, precision: Precision) -> None:
    """The edit is found in what ships, the numbers are those of the steps, and made anew it is the same graph."""
    rows, found = exported.case.inputs(5).numpy(), {}
    for way in ("steps", "fused"):
        engine, _, source = built(exported, tmp_path / way, way, precision)
        path = tmp_path / way / way / engine.file
        assert is_fused(engine) == (way == "fused")
        assert ("Attention" in {node.op_type for node in onnx.load(path).graph.node}) == is_fused(engine)
        if precision is not Precision.FP16:
            assert engine.settings["edited_layers"] == str(len(exported.case.edits))
        audit = compiled_anew(CLEAN, path, engine, source)
        assert (audit.structure, audit.differ) == ((), ())
        session = open_engine(engine, path.read_bytes(), {}, device="cpu")
        found[way] = session.run(rows)
        session.close()
    assert engine.settings["attention"] == "fused, 2 nodes"
    assert np.abs(found["fused"] - found["steps"]).max() < 5e-3


def test_one_more_operator_in_a_fused_engine_is_named(exported: Exported, tmp_path: Path) -> None:
    """And so is an engine that says that it is fused, and is not."""
    engine, _, source = built(exported, tmp_path, "fused")
    proto = onnx.load(tmp_path / "fused" / engine.file)
    _after(proto, "Attention", ("Clip", ["it", "", "high"]), high=np.float32(0.9))
    onnx.save(proto, tmp_path / "clip.onnx")
    assert "1 Clip" in compiled_anew(CLEAN, tmp_path / "clip.onnx", engine, source).structure[0]
    plain, _, _ = built(exported, tmp_path, "steps")
    audit = compiled_anew(CLEAN, tmp_path / "steps" / plain.file, engine, source)
    assert "2 Softmax" in audit.structure[0]


def test_a_fused_engine_takes_a_revert(exported: Exported, tmp_path: Path) -> None:
    """Its weights are where they were, so another edit can be put into it."""
    engine, graph, _ = built(exported, tmp_path, "fused")
    swap, rows = swap_back(exported), exported.case.inputs(4).numpy()
    for name in ("new", "refitted"):
        (tmp_path / name).mkdir()
    made = refit_graph(graph, exported.folder, tmp_path / "new", swap)
    graphs = (exported.folder / graph.file, tmp_path / "new" / graph.file)
    refitted, _ = refit_engine(engine, tmp_path / "fused", tmp_path / "refitted", swap, graphs=graphs, sample=rows)
    found = embed_with(graph, tmp_path / "refitted" / refitted.file, Precision.FP32, [rows])
    assert is_fused(refitted)
    assert np.abs(found - embed_with(made, graphs[1], Precision.FP32, [rows])).max() < 1e-5


@needs_rtx
def test_tensorrt_rtx_builds_one_node_in_float32(exported: Exported, tmp_path: Path) -> None:
    """It takes the node apart where it has no kernel; it cannot be executed here, so it cannot be measured."""
    engine, _, _ = built(exported, tmp_path, "fused", target=Target.TENSORRT_RTX)
    assert engine.settings["attention"] == "fused, 2 nodes"
    steps, _, _ = built(exported, tmp_path, "steps", target=Target.TENSORRT_RTX)
    assert int(engine.settings["layers"]) < int(steps.settings["layers"])
    assert "SOFTMAX" in steps.settings["layer_types"]
    assert "SOFTMAX" not in engine.settings["layer_types"]


class Often:
    """A session that computes everything several times."""

    def __init__(self, session: Session, times: int) -> None:
        self.session, self.times = session, times

    def run(self, batch: np.ndarray) -> np.ndarray:
        return [self.session.run(batch) for _ in range(self.times)][-1]


def opened(exported: Exported, folder: Path, way: Way) -> Session:
    engine, _, _ = built(exported, folder, way)
    return open_engine(engine, (folder / way / engine.file).read_bytes(), {}, device="cpu")


def test_numbers_decide_first_and_time_second(exported: Exported, tmp_path: Path) -> None:
    """The faster of two that agree; never one whose numbers are others, however fast, nor one that gives none."""
    rows = exported.case.inputs(4).numpy()
    steps, fused = (opened(exported, tmp_path, way) for way in ("steps", "fused"))
    faster = decide(Often(steps, 4), fused, rows, PROFILE, 1e-5)  # type: ignore[arg-type]
    slower = decide(steps, Often(fused, 4), rows, PROFILE, 1e-5)  # type: ignore[arg-type]
    assert (faster.fused, slower.fused) == (True, False)
    assert "at batch 1" in faster.why
    assert "at batch 2" in faster.why
    refused = decide(Often(steps, 4), _wrong(exported, tmp_path, 9.0), rows, PROFILE, 1e-5)  # type: ignore[arg-type]
    assert not refused.fused
    assert "embeddings differ by" in refused.why
    none = decide(Often(steps, 4), _wrong(exported, tmp_path, float("nan")), rows, PROFILE, 1e-5)  # type: ignore[arg-type]
    assert "differ by inf" in none.why


def _wrong(exported: Exported, folder: Path, scale: float) -> Session:
    """A fused engine that computes something else."""
    engine, _, _ = built(exported, folder / str(scale), "fused")
    proto = onnx.load(folder / str(scale) / "fused" / engine.file)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Attention" and attribute.name == "scale":
                attribute.f = scale
    return open_engine(engine, proto.SerializeToString(), {}, device="cpu")


@pytest.mark.parametrize("target", [Target.ONNXRUNTIME, pytest.param(Target.TENSORRT_RTX, marks=needs_rtx)])
def test_what_was_measured_is_in_the_record(exported: Exported, tmp_path: Path, target: Target) -> None:
    """One engine is left, whole, with its choice and the reason; one that cannot be executed here keeps its steps."""
    (tmp_path / "out").mkdir()

    def build(way: Way, folder: Path) -> EngineArtifact:
        return engine_from_onnx(
            exported.artifact, exported.folder, target, PROFILE, exported.case.edits, folder, attention=way
        )

    engine = engine_by_measurement(build, tmp_path / "out", exported.case.inputs(4).numpy())
    assert engine.digest == _digest(tmp_path / "out" / engine.file)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if engine.runnable:
        assert "of the time of steps" in engine.settings["attention_why"]
    else:
        assert engine.settings["attention"] == "steps"
        assert engine.settings["attention_why"] == "not measured: the engine cannot be executed here"


def _digest(path: Path) -> str:
    from uwm_deploy.records.files import digest_of_file

    return digest_of_file(path)


def test_an_engine_that_cannot_be_built_fused_keeps_its_steps(exported: Exported, tmp_path: Path) -> None:
    """The reason is in the record, and what was begun is gone."""
    (tmp_path / "out").mkdir()
    write_graph(traced_without_attention(), tmp_path / "plain.onnx")

    def build(way: Way, folder: Path) -> EngineArtifact:
        if way == "fused":
            raise ContractError("onnxruntime cannot build image: plain.onnx has no attention", fix="see its log")
        return dataclasses.replace(built(exported, tmp_path / "built", "steps")[0], runnable=True)

    engine = engine_by_measurement(build, tmp_path / "out", exported.case.inputs(2).numpy())
    assert not is_fused(engine)
    assert "one node refused: onnxruntime cannot build image" in engine.settings["attention_why"]
