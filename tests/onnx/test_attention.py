"""Attention as one node: the same numbers and weights as in steps, where it is known to be right and found to be faster."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.families import FAMILIES, model_of, reduced
from tests.onnx.conftest import Exported, make_edited
from tests.onnx.test_precision import convert
from tests.onnx.test_refit_weights import swap_back
from tests.onnx.test_structure import CLEAN, _after
from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.attention import Fused, fuse_attention, fused_file, is_fused
from uwm_deploy.graphs.attention_choice import Decision, Way, decide, engine_by_measurement
from uwm_deploy.graphs.builder_log import BuildFailed
from uwm_deploy.graphs.write import write_graph
from uwm_deploy.pipeline.refit_graphs import refit_engine, refit_graph
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.graph import EngineArtifact, Precision, Profile, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.session import Session, open_engine
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.convert.convert import embed_with
from uwm_deploy.stages.traced import sample_for, traced
from uwm_deploy.stages.verify.anew import compiled_anew

PROFILE = Profile(min=1, opt=2, max=4)
ONE_ROW = ("siglip-base", "siglip2-base")
"""Families whose image tower ends with an attention of one query row."""

QUICK = ("clip-vit-l14", "siglip-base", "open-clip-vit-b32")
"""Families with a way of their own to write attention; the others take seconds more."""

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
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
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


def test_numbers_depend_on_the_scale(text: Exported) -> None:
    """So that the comparison above can fail: another scale gives other embeddings."""
    rows = text.case.inputs(3).numpy()
    wanted, graph = answers(steps_of(text), rows), steps_of(text)
    fuse_attention(graph)
    for node in graph.graph:
        if node.op_type == "Attention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 9.0)
    assert np.abs(answers(graph, rows) - wanted).max() > 1e-4


def test_what_only_looks_like_attention_stays(text: Exported) -> None:
    """Weights that something else reads too, a softmax over another axis, logits behind one more operator."""
    whole = fuse_attention(steps_of(text)).nodes
    for change in (_read_twice, _over_queries, _one_more):
        graph = steps_of(text)
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


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The text tower, whose attention has a mask."""
    case, folder = make_edited(TowerName.TEXT), tmp_path_factory.mktemp("text")
    return Exported(case, case.export(folder), folder)


def built(exported: Exported, folder: Path, way: Way, target: Target = Target.ONNXRUNTIME) -> EngineArtifact:
    folder.mkdir()
    return engine_from_onnx(
        exported.artifact, exported.folder, target, PROFILE, exported.case.edits, folder, attention=way
    )


@pytest.fixture(scope="module")
def both(text: Exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Way, EngineArtifact]]:
    """Its float32 engines, each in a folder of the way's name."""
    folder = tmp_path_factory.mktemp("both")
    ways: tuple[Way, ...] = ("steps", "fused")
    return folder, {way: built(text, folder / way, way) for way in ways}


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8, Precision.W8A16])
def test_lower_precisions_are_fused_where_they_are_compiled(
    text: Exported, tmp_path: Path, precision: Precision
) -> None:
    """The edit is found in what ships, the numbers are those of the converted graph, and made anew it is the same."""
    graph, rows = convert(text, tmp_path / "low", precision), text.case.inputs(5).numpy()
    (tmp_path / "fused").mkdir()
    engine = engine_from_onnx(
        graph, tmp_path / "low", Target.ONNXRUNTIME, PROFILE, text.case.edits, tmp_path / "fused", attention="fused"
    )
    path = tmp_path / "fused" / engine.file
    assert engine.settings["attention"] == "fused, 2 nodes"
    assert [node.op_type for node in onnx.load(path).graph.node].count("Attention") == 2
    if precision is not Precision.FP16:  # which is optimised when it is opened, and its edit is found in the graph
        assert engine.settings["edited_layers"] == str(len(text.case.edits))
    audit = compiled_anew(CLEAN, path, engine, tmp_path / "low" / graph.file)
    assert (audit.structure, audit.differ) == ((), ())
    session = open_engine(engine, path.read_bytes(), {}, device="cpu")
    wanted = embed_with(graph, tmp_path / "low" / graph.file, precision, [rows])
    assert np.abs(session.run(rows) - wanted).max() < 5e-2
    session.close()


def test_a_fused_engine_is_made_anew_as_it_is(
    text: Exported, both: tuple[Path, dict[Way, EngineArtifact]], tmp_path: Path
) -> None:
    """The edit is in it; one operator more is named, and so is an engine that says that it is fused, and is not."""
    folder, engines = both
    engine, source = engines["fused"], text.folder / text.artifact.file
    path = folder / "fused" / engine.file
    assert (is_fused(engine), is_fused(engines["steps"])) == (True, False)
    assert engine.settings["edited_layers"] == str(len(text.case.edits))
    audit = compiled_anew(CLEAN, path, engine, source)
    assert (audit.structure, audit.differ) == ((), ())
    proto = onnx.load(path)
    _after(proto, "Attention", ("Clip", ["it", "", "high"]), high=np.float32(0.9))
    onnx.save(proto, tmp_path / "clip.onnx")
    assert "1 Clip" in compiled_anew(CLEAN, tmp_path / "clip.onnx", engine, source).structure[0]
    other = compiled_anew(CLEAN, folder / "steps" / engine.file, engine, source)
    assert any("2 Softmax" in line for line in other.structure)


def test_a_fused_engine_takes_a_revert(
    text: Exported, both: tuple[Path, dict[Way, EngineArtifact]], tmp_path: Path
) -> None:
    """Its weights are where they were, so another edit can be put into it."""
    swap, rows, graph = swap_back(text), text.case.inputs(4).numpy(), text.artifact
    for name in ("new", "refitted"):
        (tmp_path / name).mkdir()
    made = refit_graph(graph, text.folder, tmp_path / "new", swap)
    graphs = (text.folder / graph.file, tmp_path / "new" / graph.file)
    refitted, _ = refit_engine(
        both[1]["fused"], both[0] / "fused", tmp_path / "refitted", swap, graphs=graphs, sample=rows
    )
    found = embed_with(graph, tmp_path / "refitted" / refitted.file, Precision.FP32, [rows])
    assert is_fused(refitted)
    assert np.abs(found - embed_with(made, graphs[1], Precision.FP32, [rows])).max() < 1e-5


@needs_rtx
def test_tensorrt_rtx_builds_one_node_in_float32(text: Exported, tmp_path: Path) -> None:
    """It takes the node apart where it has no kernel for it."""
    engine, steps = (
        built(text, tmp_path / "fused", "fused", Target.TENSORRT_RTX),
        built(text, tmp_path / "steps", "steps", Target.TENSORRT_RTX),
    )
    assert engine.settings["attention"] == "fused, 2 nodes"
    assert int(engine.settings["layers"]) < int(steps.settings["layers"])
    assert "SOFTMAX" in steps.settings["layer_types"]
    assert "SOFTMAX" not in engine.settings["layer_types"]


class Often:
    """A session that computes everything several times."""

    def __init__(self, session: Session, times: int) -> None:
        self.session, self.times = session, times

    def run(self, batch: np.ndarray) -> np.ndarray:
        return [self.session.run(batch) for _ in range(self.times)][-1]


class NoNumber:
    """A session without an answer."""

    def run(self, batch: np.ndarray) -> np.ndarray:
        return np.full((len(batch), 16), np.nan, np.float32)


def test_numbers_decide_first_and_time_second(text: Exported, both: tuple[Path, dict[Way, EngineArtifact]]) -> None:
    """The faster of two that agree; never one whose numbers are others, however fast, nor one that gives none."""
    rows, (folder, engines) = text.case.inputs(4).numpy(), both
    graphs = {way: (folder / way / engine.file).read_bytes() for way, engine in engines.items()}
    steps, fused = (open_engine(engines[way], graphs[way], {}, device="cpu") for way in engines)
    wrong = open_engine(engines["fused"], _scaled(graphs["fused"]), {}, device="cpu")

    def choice(first: object, second: object) -> Decision:
        return decide(first, second, rows, PROFILE, 1e-5)  # type: ignore[arg-type]

    faster, slower = choice(Often(steps, 4), fused), choice(steps, Often(fused, 4))
    assert (faster.fused, slower.fused) == (True, False)
    assert "at batch 1" in faster.why
    assert "at batch 2" in faster.why
    for other in (wrong, NoNumber()):
        refused = choice(Often(steps, 4), other)
        assert not refused.fused
        assert "one node refused: embeddings differ by" in refused.why


def _scaled(graph: bytes) -> bytes:
    """A fused engine that computes something else."""
    proto = onnx.ModelProto.FromString(graph)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Attention" and attribute.name == "scale":
                attribute.f = 9.0
    content: bytes = proto.SerializeToString()
    return content


def test_what_was_measured_is_in_the_record(text: Exported, tmp_path: Path) -> None:
    """One engine is left, whole, with its choice and the reason; the settings of its build can repeat it."""
    (tmp_path / "work" / "out").mkdir(parents=True)
    out, built_in = tmp_path / "work" / "out", []

    def build(way: Way, folder: Path) -> EngineArtifact:
        built_in.append((way, folder))
        return engine_from_onnx(
            text.artifact, text.folder, Target.ONNXRUNTIME, PROFILE, text.case.edits, folder, attention=way
        )

    engine = engine_by_measurement(build, out, text.case.inputs(4).numpy())
    assert [way for way, _ in built_in] == ["steps", "fused"]
    assert engine.digest == digest_of_file(out / engine.file)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert "of the time of steps" in engine.settings["attention_why"]
    settings = json.loads((out / "text.build.json").read_text(encoding="utf-8"))
    assert settings["attention"] == ("fused" if is_fused(engine) else "steps")
    assert (out / settings["onnx"]).resolve() == (text.folder / text.artifact.file).resolve()


@pytest.mark.parametrize("runnable", [True, False])
def test_what_cannot_be_measured_keeps_its_steps(
    text: Exported, both: tuple[Path, dict[Way, EngineArtifact]], tmp_path: Path, runnable: bool
) -> None:
    """An engine that cannot be executed here, or that cannot be built with one node: the reason is in the record."""
    (tmp_path / "out").mkdir()

    def build(way: Way, _: Path) -> EngineArtifact:
        if way == "fused":
            raise ContractError("tensorrt cannot build text: no such operator", fix="see its log")
        return dataclasses.replace(both[1]["steps"], runnable=runnable)

    engine = engine_by_measurement(build, tmp_path / "out", text.case.inputs(2).numpy())
    assert not is_fused(engine)
    why = "one node refused: tensorrt cannot build text" if runnable else "not measured: the engine cannot be executed"
    assert engine.settings["attention_why"].startswith(why)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
