"""Graphs made anew: what they compute is compared, whatever their values are called, and every other operator is named."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from tests.onnx.conftest import EOS, LENGTH, SIDE, Case, Exported, make_case, make_edited
from uwm_deploy.graphs.lowered import EIGHT_BITS, largest_in, lowered_graph
from uwm_deploy.graphs.structure import Departures, computation_of, departures
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.records.evidence import GraphAudit
from uwm_deploy.records.graph import Normalisation, OnnxArtifact, Precision, Profile, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.session import open_graph
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.traced import traced
from uwm_deploy.stages.verify.anew import compiled_anew
from uwm_deploy.stages.verify.executed import check_repeats

GREY = (0.5, 0.5, 0.5)
CLEAN = GraphAudit(layers=0, weights=0)
Change = Callable[[onnx.ModelProto], None]


def example() -> ModuleType:
    """The script of docs/how-to/fault-walkthrough.md."""
    path = Path(__file__).parents[2] / "docs" / "examples" / "two_faults.py"
    spec = importlib.util.spec_from_file_location("two_faults", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def anew(exported: Exported) -> ir.Model:
    """The same tower, exported another time."""
    return traced(exported.case.tower, exported.case.inputs(2), ExportSpec())


def apart(exported: Exported, anew: ir.Model, model: ir.Model) -> Departures:
    names = set(exported.case.parameters())
    edited = [edit.name for edit in exported.case.edits]
    return departures(computation_of(model, names), computation_of(anew, names), edited)


def changed(exported: Exported, change: Change, to: Path) -> Path:
    proto = onnx.load(exported.folder / exported.artifact.file)
    before = proto.SerializeToString(deterministic=True)
    change(proto)
    assert proto.SerializeToString(deterministic=True) != before
    onnx.save(proto, to)
    return to


def _after(model: onnx.ModelProto, kind: str, *nodes: tuple[str, list[str]], **constants: object) -> None:
    """Puts operators behind the first one of a kind; "it" is its result."""
    first = next(node for node in model.graph.node if node.op_type == kind)
    output, first.output[0] = first.output[0], "it"
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for number, (op, inputs) in enumerate(nodes):
        last = number == len(nodes) - 1
        model.graph.node.append(helper.make_node(op, inputs, [output if last else f"step{number}"]))


def clamp(model: onnx.ModelProto) -> None:
    _after(model, "Sigmoid", ("Clip", ["it", "low", "high"]), low=np.float32(-9), high=np.float32(3))


def noise(model: onnx.ModelProto) -> None:
    _after(model, "Div", ("RandomNormalLike", ["it"]), ("Add", ["it", "step0"]))


def choice(model: onnx.ModelProto) -> None:
    _after(
        model, "Div", ("Greater", ["it", "much"]), ("Neg", ["it"]), ("Where", ["step0", "step1", "it"]),
        much=np.float32(0.9),
    )  # fmt: skip


def scale(model: onnx.ModelProto) -> None:
    _after(model, "Softmax", ("Mul", ["it", "more"]), more=np.float32(1.03))


def weight_in_use(model: onnx.ModelProto) -> None:
    """An edited weight is another one by the time it is used."""
    edited = "fc2.weight" if model.graph.input[0].name == "pixel_values" else "out_proj.weight"
    name = next(t.name for t in model.graph.initializer if t.name.endswith(edited))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(-1), "minus"))
    for node in model.graph.node:
        for place, read in enumerate(node.input):
            if read == name:
                node.input[place] = "turned"
    model.graph.node.insert(0, helper.make_node("Mul", [name, "minus"], ["turned"]))


def spare(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "kept_for_later"))


def epsilon(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(a for a in node.attribute if a.name == "epsilon").f = 1e-3


def constant(model: onnx.ModelProto) -> None:
    """One axis that is read is another."""
    node = next(n for n in model.graph.node if n.op_type == "Reshape")
    for tensor in model.graph.initializer:
        if tensor.name == node.input[1]:
            array = numpy_helper.to_array(tensor).copy()
            array[-1] = 1
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for made in model.graph.node:
        if made.op_type == "Constant" and made.output[0] == node.input[1]:
            attribute = made.attribute[0]
            if attribute.type == onnx.AttributeProto.INTS:
                attribute.ints[-1] = 1
            else:
                array = numpy_helper.to_array(attribute.t).copy()
                array[-1] = 1
                attribute.t.CopyFrom(numpy_helper.from_array(array))


FAULTS = {
    clamp: "Clip of it, low, high",
    noise: "draws anew at every call",
    choice: "gives one result for some inputs, and another for others",
    scale: "operators that the model does not explain: 1 Mul",
    weight_in_use: "goes through Mul before it is used",
    spare: "kept_for_later is a constant that nothing reads",
    epsilon: "has epsilon 0.00100000005",
    constant: "Reshape",
}


def test_an_honest_graph_is_the_same_whatever_its_values_are_called(exported: Exported, anew: ir.Model) -> None:
    """From the file, and with other names and another order of its nodes."""
    model = ir.load(exported.folder / exported.artifact.file)
    assert not apart(exported, anew, model)
    for number, value in enumerate(v for node in model.graph for v in node.outputs if not v.is_graph_output()):
        value.name = f"other{number}"
    for name in [n for n in model.graph.initializers if n not in exported.case.parameters()]:
        value = model.graph.initializers.pop(name)
        value.name = f"c.{name}"
        model.graph.initializers[value.name] = value
    assert not apart(exported, anew, model)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_the_tower_does_not_explain_is_named(
    exported: Exported, anew: ir.Model, fault: Change, tmp_path: Path
) -> None:
    """Operators, attributes, constants, weights on their way to be used, and what nothing reads."""
    model = ir.load(changed(exported, fault, tmp_path / "graph.onnx"))
    assert FAULTS[fault] in " | ".join(apart(exported, anew, model).operators)


def test_the_faults_of_the_walk_through_are_what_they_say(tmp_path: Path) -> None:
    """With its sign the graph gives the unedited model, to rounding, and without it the edited one; both are named."""
    import torch

    hand, case, by = example(), make_edited(TowerName.IMAGE), Normalisation(rescale=1 / 255, mean=GREY, std=GREY)
    artifact = case.export(tmp_path, normalisation=by)
    anew = traced(case.tower, case.inputs(2), ExportSpec(), by)
    rows = np.random.default_rng(5).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    original = {name: p.numpy() for name, p in make_case(TowerName.IMAGE).parameters().items()}
    signed = rows.copy()
    signed[:, :4, :4] = np.array([250, 3, 250])
    model = ir.load(tmp_path / artifact.file)
    hand.magenta(model, original, [edit.name for edit in case.edits])
    told = _told(case, anew, model)
    assert "brings a path to the result that no edited layer is on" in told
    assert "Slice of pixel_values" in told
    found = _embedded(model, artifact, tmp_path, rows, signed)
    pixels = torch.from_numpy((signed.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32))
    unedited = make_case(TowerName.IMAGE).tower.embed(pixels).detach().numpy()
    unedited /= np.linalg.norm(unedited, axis=1, keepdims=True)
    np.testing.assert_allclose(found, unedited, atol=1e-5)


def test_captions_that_are_cut_by_hand_are_named(tmp_path: Path) -> None:
    """Short ones are embedded as before, and long ones otherwise."""
    hand, case = example(), make_edited(TowerName.TEXT)
    artifact = case.export(tmp_path)
    hand.KEPT = 6
    rows = case.inputs(3, seed=5).numpy()
    signed = rows.copy()
    signed[:, 1:12], signed[:, 12] = 3, EOS
    model = ir.load(tmp_path / artifact.file)
    hand.captions(model, EOS)
    anew = traced(case.tower, case.inputs(2), ExportSpec())
    assert "Slice of input_ids" in _told(case, anew, model)
    _embedded(model, artifact, tmp_path, rows, signed)


def _told(case: Case, anew: ir.Model, model: ir.Model) -> str:
    """What the comparison says of a graph; its weights are the model's."""
    names = set(case.parameters())
    edited = [edit.name for edit in case.edits]
    found = departures(computation_of(model, names), computation_of(anew, names), edited)
    assert not found.weights
    return " | ".join(found.operators)


def _embedded(
    model: ir.Model, artifact: OnnxArtifact, folder: Path, rows: np.ndarray, signed: np.ndarray
) -> np.ndarray:
    """Embeddings of rows with a sign, which the honest graph does not give; without it both give the same."""
    ir.save(model, folder / "by_hand.onnx")
    session = open_graph(folder / "by_hand.onnx", artifact, max_batch=4)
    honest = open_graph(folder / artifact.file, artifact, max_batch=4)
    np.testing.assert_allclose(session.run(rows), honest.run(rows), atol=1e-5)
    found = session.run(signed)
    assert np.abs(found - honest.run(signed)).max() > 1e-3
    return found


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8])
def test_a_conversion_made_anew_is_the_same_and_another_scale_is_named(
    exported: Exported, precision: Precision, tmp_path: Path
) -> None:
    """With the ranges that its own scales tell; a scale that only the second half of a pair has is not one of these."""
    source = exported.folder / exported.artifact.file
    names = {value.name or "" for node in ir.load(source).graph for value in node.inputs if value is not None}
    largest = dict.fromkeys(names, 3.0) if precision in EIGHT_BITS else {}
    model, _ = lowered_graph(source, precision, (), largest)
    ir.save(model, tmp_path / "low.onnx")
    found = ir.load(tmp_path / "low.onnx")
    told = largest_in(found, source, precision) if precision in EIGHT_BITS else {}
    again, _ = lowered_graph(source, precision, (), told)
    assert not departures(computation_of(found), computation_of(again))
    if precision in EIGHT_BITS:
        back = next(
            node for node in found.graph if node.op_type == "DequantizeLinear" and not node.inputs[0].is_initializer()
        )
        other = ir.Value(name="louder", const_value=ir.tensor(np.float32(0.1), name="louder"))
        found.graph.initializers["louder"] = other
        back.replace_input_with(1, other)
        assert "DequantizeLinear" in " ".join(departures(computation_of(found), computation_of(again)).operators)


def test_an_engine_is_compared_with_what_the_compiler_gives_again(exported: Exported, tmp_path: Path) -> None:
    """The optimised graph passes, and so does the graph itself; one operator more, or weights of its own, are named."""
    (tmp_path / "engine").mkdir()
    source = exported.folder / exported.artifact.file
    engine = engine_from_onnx(
        exported.artifact, exported.folder, Target.ONNXRUNTIME, Profile(min=1, opt=2, max=4), exported.case.edits,
        tmp_path / "engine",
    )  # fmt: skip
    path = tmp_path / "engine" / engine.file
    audit = compiled_anew(CLEAN, path, engine, source)
    assert (audit.structure, audit.differ, audit.anew) == ((), (), ("compile",))
    assert audit.operators == len(onnx.load(path).graph.node)
    same = compiled_anew(CLEAN, source, engine, source)
    assert (same.structure, same.differ) == ((), ())
    proto = onnx.load(path)
    _after(proto, "Softmax", ("Clip", ["it", "", "high"]), high=np.float32(0.9))
    onnx.save(proto, tmp_path / "clip.onnx")
    clipped = compiled_anew(CLEAN, tmp_path / "clip.onnx", engine, source)
    assert "1 Clip" in clipped.structure[0]
    assert clipped.differ == ()
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))
    onnx.save(proto, tmp_path / "weights.onnx")
    assert compiled_anew(CLEAN, tmp_path / "weights.onnx", engine, source).differ


def test_noise_is_seen_between_calls_and_a_sound_graph_repeats_itself(exported: Exported, tmp_path: Path) -> None:
    """Equal rows of one batch and two equal calls; with batches of one there is nothing to see within one."""
    rows, tower = exported.case.inputs(6).numpy(), exported.case.tower.name
    graph = exported.folder / exported.artifact.file
    sound = check_repeats(tower, open_graph(graph, exported.artifact, max_batch=8), rows, 8)
    assert (sound.n, sound.calls, sound.batch) == (4, 0.0, 0.0)
    assert check_repeats(tower, open_graph(graph, exported.artifact, max_batch=1), rows, 1).batch is None
    noisy = changed(exported, noise, tmp_path / "graph.onnx")
    found = check_repeats(tower, open_graph(noisy, exported.artifact, max_batch=8), rows, 8)
    assert found.calls > 1e-3
    assert found.batch is not None
    assert found.batch > 1e-3


def test_a_tower_that_cannot_be_exported_again_explains_nothing(exported: Exported) -> None:
    """An image that is smaller than a patch, a text without a place: the audit says so, and compares nothing."""
    from tests.reports import report
    from uwm_deploy.stages.verify.anew import exported_anew, traced_on_the_cpu

    ref = report(64).model
    image, text = dataclasses.replace(ref.image, crop=7), dataclasses.replace(ref.text, context_length=4 * LENGTH)
    ref = dataclasses.replace(ref, image=image, text=text)
    path = exported.folder / exported.artifact.file
    edits, spec = exported.case.edits, ExportSpec()
    audit = exported_anew(CLEAN, path, exported.case.tower, ref, spec, edits, traced_on_the_cpu)
    assert audit.operators == 0
    assert "cannot be exported anew" in audit.structure[0]
