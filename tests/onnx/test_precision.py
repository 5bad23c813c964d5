"""Lower precision: the edit, the names and the decisions survive it, or it is refused."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.onnx.conftest import Exported
from uwm_deploy.data.embedding import PreparedSet
from uwm_deploy.errors import ContractError, DataError, InputError, PrerequisiteError
from uwm_deploy.graphs.achieved_precision import achieved_precision, low_share
from uwm_deploy.graphs.cpu_integers import add_biases, fit_for_cpu, narrowed
from uwm_deploy.graphs.fingerprint import digest_of_onnx, fingerprint_of_lowered
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.quantise import rounded_weight, weight_scale
from uwm_deploy.graphs.tensor_layout import stored_tensors
from uwm_deploy.graphs.weight_blocks import in_one_block
from uwm_deploy.graphs.write import ALIGNMENT, LARGE, weightless, write_graph
from uwm_deploy.recipes.compile_spec import AutoSpec
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.graph import OnnxArtifact, Precision, Profile, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.node_order import weights_before_use
from uwm_deploy.runtime.session import open_engine
from uwm_deploy.safeground.canaries import Canaries, choose, ratios
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.convert.calibrate import chosen_for, one_row_layers
from uwm_deploy.stages.convert.convert import Ranges, converted, embed_with, lower, ranges_of
from uwm_deploy.stages.convert.search import Source, _between, search

LOW = (Precision.FP16, Precision.INT8, Precision.FP8, Precision.W8A16)
PROFILE = Profile(min=1, opt=2, max=4)


def rows(exported: Exported, count: int, seed: int = 0) -> np.ndarray:
    return exported.case.inputs(count, seed).numpy()


def ranges_for(exported: Exported, folder: Path) -> Ranges:
    batches = {"safe": [rows(exported, 8, 1), rows(exported, 8, 2)], "unsafe": [rows(exported, 8, 3)]}
    return ranges_of(exported.folder / exported.artifact.file, batches, folder)


def convert(exported: Exported, folder: Path, precision: Precision, **changes: object) -> OnnxArtifact:
    folder.mkdir(exist_ok=True)
    options = {
        "asked": precision, "lowered": precision, "patterns": (), "layers": (), "canaries": None,
        "ranges": ranges_for(exported, folder) if precision in (Precision.INT8, Precision.FP8) else None,
        "edits": exported.case.edits, "patch": exported.case.patch, **changes,
    }  # fmt: skip
    asked = options.pop("asked")
    return converted(exported.artifact, exported.folder, folder, precision=asked, **options)  # type: ignore[arg-type]


def reference(exported: Exported, count: int) -> np.ndarray:
    path = exported.folder / exported.artifact.file
    return embed_with(exported.artifact, path, Precision.FP32, [rows(exported, count)])


@pytest.mark.parametrize("precision", [*LOW, Precision.BF16])
def test_graph_is_valid_keeps_names_and_holds_the_edit(
    exported: Exported, tmp_path: Path, precision: Precision
) -> None:
    """Every weight keeps its name; the checker passes it; its precision is read back; in and out stay float32."""
    graph = convert(exported, tmp_path / "out", precision)
    path = tmp_path / "out" / graph.file
    onnx.checker.check_model(str(path), full_check=True)
    names = {i.name for i in onnx.load(path).graph.initializer}
    assert {name for name, _ in exported.case.tower.graph_module().named_parameters()} <= names
    assert graph.fingerprint.layers == len(exported.case.edits)
    assert graph.conversion is not None
    assert low_share(graph.conversion.achieved, precision.value) == 1
    assert (graph.inputs, graph.outputs) == (exported.artifact.inputs, exported.artifact.outputs)
    proto = onnx.load(path)
    kinds = {v.type.tensor_type.elem_type for v in proto.graph.output}
    assert kinds == {onnx.TensorProto.FLOAT}
    assert convert(exported, tmp_path / "again", precision).digest == graph.digest


@pytest.mark.parametrize(
    ("precision", "cosine"),
    [(Precision.FP16, 0.99999), (Precision.INT8, 0.97), (Precision.FP8, 0.97), (Precision.W8A16, 0.999)],
)
def test_embeddings_stay_near(exported: Exported, tmp_path: Path, precision: Precision, cosine: float) -> None:
    """ONNX Runtime executes it, at any batch, near the float32 graph but not equal to it."""
    graph = convert(exported, tmp_path, precision)
    found = embed_with(graph, tmp_path / graph.file, precision, [rows(exported, 5)])
    wanted = reference(exported, 5)
    assert (found * wanted).sum(1).min() > cosine
    assert not np.array_equal(found, wanted)


def test_islands_stay_in_float32(exported: Exported, tmp_path: Path) -> None:
    """Patterns over layers and operators, and layers by name."""
    name = exported.case.edits[0].name
    layer = name.removesuffix(".weight")
    model, _ = lower(exported.folder / exported.artifact.file, Precision.FP16, ("LayerNormalization",), {layer}, None)
    achieved = achieved_precision(model)
    assert set(achieved["layer norm"]) == {"fp32"}
    assert achieved["linear"]["fp32"] == 1
    weights = {key: value.dtype for key, value in model.graph.initializers.items()}
    assert weights[name] == ir.DataType.FLOAT
    with pytest.raises(InputError, match="matches no layer"):
        lower(exported.folder / exported.artifact.file, Precision.FP16, ("*.no_such",), (), None)


def test_a_pattern_that_matches_nothing_is_told_what_there_is(exported: Exported) -> None:
    """The nearest layers, or the first ones: no command lists the layers of a graph."""
    source = exported.folder / exported.artifact.file
    layers = list(linear_layers(ir.load(source)))
    near = next(name for name in layers if name.endswith("fc1"))
    for pattern, named in ((f"*{near}x", [near]), ("*.mlp.fc3", [near]), ("nosuch*", layers[:3])):
        with pytest.raises(InputError, match="matches no layer") as caught:
            lower(source, Precision.FP16, (pattern,), (), None)
        assert all(name in caught.value.fix for name in named)
        assert "inspect" not in caught.value.fix


def test_a_precision_that_is_not_achieved_is_an_error(exported: Exported, tmp_path: Path) -> None:
    """Asking for fp16 and keeping everything in float32 is not fp16."""
    with pytest.raises(InputError, match="no linear layer"):
        convert(exported, tmp_path, Precision.FP16, patterns=("MatMul", "Gemm"))


def test_scales_of_weights_do_not_move_with_the_edit() -> None:
    """Negation changes no largest absolute value, so an edited engine has the scales of the unedited one."""
    weight = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    edited = weight.copy()
    edited.flat[::3] *= -1
    for kind in ("int8", "fp8"):
        before, after = weight_scale(weight, 1, kind), weight_scale(edited, 1, kind)  # type: ignore[arg-type]
        assert np.array_equal(before, after)
        signs = rounded_weight(edited, after, 1, kind).astype(np.float32)  # type: ignore[arg-type]
        assert not (np.sign(signs) * np.sign(edited) < 0).any()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_lost_edit_is_seen_in_any_type(exported: Exported, dtype: str) -> None:
    """The unedited weight in lower precision is a mismatch, transposed or not; zeros are counted."""
    edits, patches = exported.case.edits, exported.case.patch.tensors
    source = {e.name: exported.case.weights()[e.name].numpy() for e in edits}
    unedited = {}
    for edit in edits:
        weight = source[edit.name].copy()
        weight.flat[patches[edit.name].indices.numpy()] *= -1
        scale = np.abs(weight).max() / 127
        unedited[edit.name] = weight.astype(dtype) if dtype == "float16" else np.rint(weight / scale).astype(dtype).T
    lost, _ = fingerprint_of_lowered(source, unedited, edits, patches)
    assert len(lost.mismatches) == len(edits)
    zero = {name: np.zeros(array.shape, np.int8) for name, array in source.items()}
    found, zeroed = fingerprint_of_lowered(source, zero, edits, patches)
    assert (found.entries, zeroed) == (0, sum(edit.selected for edit in edits))
    assert fingerprint_of_lowered(source, {}, edits, patches)[0].mismatches


def test_ranges_come_from_both_classes(exported: Exported, tmp_path: Path) -> None:
    """Safe inputs alone are refused, and so are held-out unsafe inputs that lie far outside; coverage says how far."""
    source = exported.folder / exported.artifact.file
    with pytest.raises(ContractError, match="inputs only"):
        ranges_of(source, {"safe": [rows(exported, 8)]}, tmp_path)
    with pytest.raises(ContractError, match="too few"):
        ranges_of(source, {"safe": [rows(exported, 8)], "unsafe": [rows(exported, 2)]}, tmp_path)
    found = ranges_for(exported, tmp_path)
    assert set(found.coverage) == {"safe", "unsafe"}
    assert found.coverage["safe"].n == 4
    assert 0 < found.coverage["unsafe"].inside <= 1
    assert not list(tmp_path.glob("*tmp*"))


def test_unsafe_inputs_outside_the_range_are_refused(tmp_path: Path) -> None:
    """A held-out unsafe input that is far larger than all others would be cut off."""
    weight = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "fc.weight")
    node = onnx.helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="fc")
    shape = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 4]) for n in ("x", "y")]
    graph = onnx.helper.make_graph([node], "g", shape[:1], shape[1:], [weight])
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "g.onnx")
    plain, loud = np.ones((8, 4), np.float32), np.ones((8, 4), np.float32)
    loud[3] *= 10
    found = ranges_of(tmp_path / "g.onnx", {"safe": [loud], "unsafe": [plain]}, tmp_path)
    assert (found.largest["x"], found.coverage["safe"].worst, found.coverage["safe"].inside) == (10.0, 10.0, 0.5)
    with pytest.raises(ContractError, match="unsafe inputs reach 10"):
        ranges_of(tmp_path / "g.onnx", {"safe": [plain], "unsafe": [loud]}, tmp_path)


def test_a_weight_beyond_half_precision_is_refused(exported: Exported, tmp_path: Path) -> None:
    """Masks are clamped; a weight that does not fit would become infinity."""
    model = ir.load(exported.folder / exported.artifact.file)
    name = exported.case.edits[0].name
    value = model.graph.initializers[name]
    assert value.const_value is not None
    weight = np.array(value.const_value.numpy())
    weight[0, 0] = 1e6
    value.const_value = ir.tensor(weight, name=name)
    write_graph(model, tmp_path / "loud.onnx")
    with pytest.raises(ContractError, match="outside the range"):
        lower(tmp_path / "loud.onnx", Precision.FP16, (), (), None)
    lowered, _ = lower(tmp_path / "loud.onnx", Precision.BF16, (), (), None)
    assert low_share(achieved_precision(lowered), "bf16") == 1


def test_canaries_tell_the_edited_from_the_original_model(exported: Exported, tmp_path: Path) -> None:
    """A conversion nearer to the original than to the edited model is refused before anything is compiled."""
    inputs = rows(exported, 8)
    edited = reference(exported, 8)
    rng = np.random.default_rng(0)
    original = edited + 0.5 * rng.normal(size=edited.shape).astype(np.float32)
    good = Canaries(inputs, original, edited)
    graph = convert(exported, tmp_path / "good", Precision.INT8, canaries=good)
    assert graph.conversion is not None
    assert graph.conversion.canary_ratio_max is not None
    assert graph.conversion.canary_ratio_max < 0.5
    assert graph.conversion.canaries == 8
    with pytest.raises(ContractError, match="worst canary"):
        convert(exported, tmp_path / "bad", Precision.INT8, canaries=Canaries(inputs, edited, original))


def test_canaries_are_chosen_where_the_models_differ() -> None:
    """Largest distance first; rows without any are no canaries; broken rows are never near."""
    original = np.eye(4, dtype=np.float32)
    edited = original.copy()
    edited[1], edited[2] = [0.6, 0.8, 0, 0], [0, 0.1, 1, 0]
    assert choose(original, edited).tolist() == [1, 2]
    rows_ = np.array([1, 2])
    assert ratios(edited[rows_], original[rows_], edited[rows_]).tolist() == [0, 0]
    assert np.isinf(ratios(original[rows_], original[rows_], edited[rows_])).all()
    assert np.isinf(ratios(np.full((2, 4), np.nan), original[rows_], edited[rows_])).all()
    with pytest.raises(DataError, match="does not tell"):
        ratios(edited, original, edited)


@pytest.mark.parametrize("precision", [*LOW, Precision.BF16])
def test_tensorrt_rtx_builds_every_precision(exported: Exported, tmp_path: Path, precision: Precision) -> None:
    """Ahead of time, on a machine without a GPU; the types of the parsed network are read back; bytes repeat."""
    pytest.importorskip("tensorrt_rtx")
    graph = convert(exported, tmp_path / "graphs", precision)
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        engine = engine_from_onnx(
            graph, tmp_path / "graphs", Target.TENSORRT_RTX, PROFILE, exported.case.edits, tmp_path / name
        )
        assert engine.variant == f"tensorrt-rtx-{precision.value}"
        assert engine.precision == precision
        assert engine.onnx_digest == graph.digest != exported.artifact.digest
        digests.add(engine.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("precision", LOW)
def test_onnx_runtime_engine_of_every_precision(exported: Exported, tmp_path: Path, precision: Precision) -> None:
    """What is shipped is what is measured; the edited weights are found bit for bit in the optimised graph."""
    graph = convert(exported, tmp_path / "graphs", precision)
    (tmp_path / "engine").mkdir()
    engine = engine_from_onnx(
        graph, tmp_path / "graphs", Target.ONNXRUNTIME, PROFILE, exported.case.edits, tmp_path / "engine"
    )
    session = open_engine(engine, (tmp_path / "engine" / engine.file).read_bytes(), {}, device="cpu")
    found, wanted = session.run(rows(exported, 5)), reference(exported, 5)
    assert (found * wanted).sum(1).min() > 0.98
    if precision is Precision.INT8:
        nodes = onnx.load(tmp_path / "engine" / engine.file).graph.node
        kinds = {n.op_type for n in nodes}
        inputs = [len(n.input) for n in nodes if n.op_type == "MatMulIntegerToFloat"]
        assert inputs.count(7) >= len(inputs) - 1 > 0  # the bias among them, but where a normalisation adds it
        assert "DequantizeLinear" not in kinds  # query, key and value share an input, and are multiplied in 8 bits too
        assert engine.settings["integers"] == "unsigned activations, 7-bit weights"
        assert engine.settings["edited_layers"] == str(len(exported.case.edits))


@pytest.mark.parametrize("beside", [False, True])
def test_weights_alone_go_to_8_bits(exported: Exported, tmp_path: Path, beside: bool) -> None:
    """No activation is rounded; the compiled graph computes what the converted one says, with one block per channel.

    Weights inside the graph or in a file beside it.
    """
    folder = tmp_path / "graphs"
    graph = convert(exported, folder, Precision.W8A16)
    if beside:
        name = f"{graph.file}.data"
        onnx.save(onnx.load(folder / graph.file), folder / graph.file, save_as_external_data=True, location=name)
        graph = dataclasses.replace(graph, external_data=name, digest=digest_of_onnx(folder / graph.file, name))
    (tmp_path / "engine").mkdir()
    engine = engine_from_onnx(graph, folder, Target.ONNXRUNTIME, PROFILE, exported.case.edits, tmp_path / "engine")
    model = onnx.load(tmp_path / "engine" / engine.file)
    onnx.checker.check_model(model.SerializeToString(), check_custom_domain=False)
    kinds = [node.op_type for node in model.graph.node]
    assert not {"QuantizeLinear", "MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeLinear"} & set(kinds)
    assert graph.conversion is not None
    assert kinds.count("DequantizeLinear") == graph.conversion.achieved["linear"]["w8a16"]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node, after in itertools.pairwise(model.graph.node):  # one weight at a time is float32
        assert node.op_type != "DequantizeLinear" or node.output[0] in after.input
    for node in (node for node in model.graph.node if node.op_type == "DequantizeLinear"):
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        weight, scale = (list(weights[name].dims) for name in node.input[:2])
        assert settings["block_size"] == weight[settings["axis"]]
        assert scale == [1 if axis == settings["axis"] else size for axis, size in enumerate(weight)]
    external = {engine.external_data: (tmp_path / "engine" / engine.external_data).read_bytes()} if beside else {}
    session = open_engine(engine, (tmp_path / "engine" / engine.file).read_bytes(), external, device="cpu")
    again = embed_with(graph, folder / graph.file, Precision.W8A16, [rows(exported, 5)], graph.external_data)
    assert np.abs(session.run(rows(exported, 5)) - again).max() < 1e-5
    assert engine.settings["weights"] == "float32,int8"


def test_a_scale_of_another_shape_stays_as_it_is() -> None:
    """Weights with one scale, or with blocks already, and activations: nothing but a scale per channel becomes a block."""
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        agraph (float[n,4] x, int8[n,4] q) => (float[n,2] y, float[2,n] t, float[n,4] u)
        <int8[4,2] a = {1,2,3,4,5,6,7,8}, int8[4,2] b = {1,2,3,4,5,6,7,8}, int8[4,2] c = {1,2,3,4,5,6,7,8},
         int8[2,4] d = {1,2,3,4,5,6,7,8}, float s = {0.5}, float[2] each = {0.5,0.25}, float[2,2] blocks = {1.0,2.0,3.0,4.0},
         int8[2] zeros = {0,0}, float[2] rows = {0.5,0.25}>
        {
            one = DequantizeLinear (a, s)
            two = DequantizeLinear <axis: int = 1> (b, each, zeros)
            three = DequantizeLinear <axis: int = 0, block_size: int = 2> (c, blocks)
            four = DequantizeLinear <axis: int = 0> (d, rows)
            u = DequantizeLinear (q, s)
            l = MatMul (x, one)
            m = MatMul (x, two)
            o = MatMul (x, three)
            p = Add (l, m)
            y = Add (o, p)
            turned = Transpose <perm: ints = [1, 0]> (x)
            t = MatMul (four, turned)
        }
    """
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    feed = {"x": rng.normal(size=(3, 4)).astype(np.float32), "q": rng.integers(-9, 9, (3, 4)).astype(np.int8)}

    def answers() -> list[np.ndarray]:
        return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)

    before = answers()
    assert in_one_block(model) == 2
    assert all(np.array_equal(a, b) for a, b in zip(before, answers(), strict=True))
    assert in_one_block(model) == 0


def test_weights_move_to_where_they_are_used() -> None:
    """The first reader counts, an activation stays, and a weight that only a nested graph reads stays in front."""
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        agraph (float[n,2] x, int8[2,2] given, bool more) => (float[n,2] y, float[n,2] z)
        <int8[2,2] a = {1,2,3,4}, int8[2,2] b = {5,6,7,8}, int8[2,2] c = {1,1,2,2}, float s = {0.5}>
        {
            first = DequantizeLinear (a, s)
            second = DequantizeLinear (b, s)
            activation = DequantizeLinear (given, s)
            nested = DequantizeLinear (c, s)
            m = MatMul (x, activation)
            n1 = MatMul (m, second)
            n2 = MatMul (n1, first)
            y = MatMul (n2, second)
            z = If (more) <then_branch = yes () => (float[n,2] t) { t = MatMul (n1, nested) },
                           else_branch = no () => (float[n,2] e) { e = Identity (n1) }>
        }
    """
    model = onnx.parser.parse_model(text)
    model.doc_string = "kept"
    moved = onnx.load_from_string(weights_before_use(model.SerializeToString()))
    order = [node.output[0] for node in moved.graph.node]
    assert order == ["nested", "activation", "m", "second", "n1", "first", "n2", "y", "z"]
    onnx.checker.check_model(moved, full_check=True)
    assert sorted(map(str, moved.graph.node)) == sorted(map(str, model.graph.node))
    for part in (moved, model):
        del part.graph.node[:]
    assert moved == model


def test_integers_for_the_cpu_are_nearly_the_same_numbers(exported: Exported, tmp_path: Path) -> None:
    """Zero points of activations move, weights lose a bit and no sign; a second time changes only what cannot be seen."""
    graph = convert(exported, tmp_path, Precision.INT8)
    before, after = onnx.load(tmp_path / graph.file), onnx.load(tmp_path / graph.file)
    fit_for_cpu(after, tmp_path)
    onnx.checker.check_model(after, full_check=True)
    old, new = ({t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer} for m in (before, after))
    zeros = {node.input[2] for node in after.graph.node if node.op_type == "QuantizeLinear"}
    assert zeros
    assert all((new[name].dtype, new[name]) == (np.uint8, 128) for name in zeros)
    weights = {
        n.input[0]: n.input[1] for n in after.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in new
    }
    assert len(weights) >= 12
    for name, scale in weights.items():
        assert np.abs(new[name]).max() == 64
        assert np.array_equal(np.sign(new[name]), np.sign(old[name]))
        axis = next(a.i for n in after.graph.node if name in n.input[:1] for a in n.attribute if a.name == "axis")
        steps = [np.expand_dims(values[scale], 1 - axis) for values in (old, new)]
        apart = np.abs(new[name] * steps[1] - old[name] * steps[0])
        assert (apart <= 0.501 * steps[1]).all()
    changed = zeros | set(weights) | set(weights.values())
    assert all(np.array_equal(old[name], new[name]) for name in old if name not in changed)


def test_a_weight_that_cannot_be_narrowed_is_named(tmp_path: Path) -> None:
    """One scale for two weights, or a weight that is read twice: what else reads them expects what they were."""
    text = """
        <ir_version: 9, opset_import: ["" : 17]>
        agraph (float[n,2] x) => (float[n,2] y)
        <int8[2,2] a = {127,-127,1,2}, int8[2,2] b = {127,3,1,2}, int8[2,2] c = {5,-128,1,127}, float[2] s = {0.5,0.25},
         float[2] own = {0.5,0.25}, int8[2] z = {0,0}>
        {
            left = DequantizeLinear <axis: int = 1> (a, s, z)
            right = DequantizeLinear <axis: int = 1> (b, s, z)
            third = DequantizeLinear <axis: int = 1> (c, own)
            u = MatMul (x, left)
            v = MatMul (u, right)
            y = MatMul (v, third)
        }
    """
    model = onnx.parser.parse_model(text)
    assert fit_for_cpu(model, tmp_path) == ["a", "b"]
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert kept["a"].max() == kept["b"].max() == 127
    assert (kept["c"].min(), kept["c"].max()) == (-64, 64)


def test_no_sum_of_two_products_overflows() -> None:
    """The largest weight there is, twice, with the largest activation; one more would be too much for 16 bits."""
    largest = int(np.abs(narrowed(np.arange(-127, 128, dtype=np.int8))).max())
    assert largest * 255 * 2 < 2**15 <= (largest + 1) * 255 * 2


def test_eight_bits_give_the_same_numbers_with_and_without_their_own_kernels(
    exported: Exported, tmp_path: Path
) -> None:
    """What ONNX Runtime computes in 8 bits is what the graph says in float32, to rounding, on this processor as on any."""
    graph = convert(exported, tmp_path, Precision.INT8)
    model = onnx.load(tmp_path / graph.file)
    fit_for_cpu(model, tmp_path)
    found = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, {model.graph.input[0].name: rows(exported, 64)})[0])
    plain, kernels = found
    assert (plain * kernels).sum(1).min() > 0.9999


def test_biases_are_added_where_nothing_else_reads_the_product() -> None:
    """The same bits; a product that is read twice or given out, or to which no vector of its width is added, stays."""
    text = """
        <ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>
        agraph (float[n,4] x) => (float[n,3] alone, float[n,3] twice, float[n,3] first, float[n,3] row, float[n,3] product,
                                 float[n,3] product_and_bias, float[n,3] one_for_all)
        <float s = {0.1}, uint8 z = {128}, int8[4,3] w = {1,-2,3,4,5,-6,7,8,9,-10,11,12}, float[3] ws = {0.5,0.25,0.125},
         int8[3] wz = {0,0,0}, float[3] b = {1.0,2.0,3.0}, float[1,3] r = {1.0,2.0,3.0}, float[1] o = {1.0}>
        {
            q = QuantizeLinear (x, s, z)
            one = com.microsoft.MatMulIntegerToFloat (q, w, s, ws, z, wz)
            alone = Add (b, one)
            two = com.microsoft.MatMulIntegerToFloat (q, w, s, ws, z, wz)
            twice = Add (two, b)
            first = Identity (two)
            three = com.microsoft.MatMulIntegerToFloat (q, w, s, ws, z, wz)
            row = Add (three, r)
            product = com.microsoft.MatMulIntegerToFloat (q, w, s, ws, z, wz)
            product_and_bias = Add (product, b)
            four = com.microsoft.MatMulIntegerToFloat (q, w, s, ws, z, wz)
            one_for_all = Add (four, o)
        }
    """
    model = onnx.parser.parse_model(text)
    x = {"x": np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    before = ort.InferenceSession(model.SerializeToString(), options).run(None, x)
    assert add_biases(model) == 1
    assert [n.op_type for n in model.graph.node].count("Add") == 4
    after = ort.InferenceSession(model.SerializeToString(), options).run(None, x)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_engine_in_8_bits_of_a_graph_with_external_weights(exported: Exported, tmp_path: Path) -> None:
    """Weights are found beside the graph although it was changed in memory, and beside the engine again."""
    folder = tmp_path / "graphs"
    graph = convert(exported, folder, Precision.INT8)
    inside = onnx.load(folder / graph.file)
    name = f"{graph.file}.data"
    onnx.save(inside, folder / graph.file, save_as_external_data=True, location=name)
    apart = dataclasses.replace(graph, external_data=name, digest=digest_of_onnx(folder / graph.file, name))
    (tmp_path / "engine").mkdir()
    engine = engine_from_onnx(apart, folder, Target.ONNXRUNTIME, PROFILE, exported.case.edits, tmp_path / "engine")
    files = {n: (tmp_path / "engine" / n).read_bytes() for n in (engine.file, engine.external_data)}
    session = open_engine(engine, files[engine.file], {engine.external_data: files[engine.external_data]}, device="cpu")
    assert (session.run(rows(exported, 5)) * reference(exported, 5)).sum(1).min() > 0.98


def test_onnx_runtime_has_no_bfloat16(exported: Exported, tmp_path: Path) -> None:
    """Said before anything is written, and not found out by a crash."""
    graph = convert(exported, tmp_path, Precision.BF16)
    with pytest.raises(PrerequisiteError, match="bfloat16"):
        engine_from_onnx(graph, tmp_path, Target.ONNXRUNTIME, PROFILE, exported.case.edits, tmp_path)


def test_streamed_file_is_an_ordinary_onnx_file(exported: Exported, tmp_path: Path) -> None:
    """The same tensors and nodes as the usual writer's, the same bytes each time, and one graph message."""
    model = ir.load(exported.folder / exported.artifact.file)
    write_graph(model, tmp_path / "ours.onnx")
    assert write_graph(model, tmp_path / "again.onnx") == digest_of_file(tmp_path / "ours.onnx")
    ir.save(model, tmp_path / "usual.onnx")
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()
    ours, usual = onnx.load(tmp_path / "ours.onnx"), onnx.load(tmp_path / "usual.onnx")
    assert ours.graph.node == usual.graph.node
    large = [tensor for tensor in stored_tensors(tmp_path / "ours.onnx") if tensor.size_bytes > LARGE]
    assert large
    assert not [tensor.name for tensor in large if tensor.offset % ALIGNMENT]
    for tensor in (*ours.graph.initializer, *usual.graph.initializer):
        tensor.ClearField("doc_string")  # what pushed it there
    assert {i.name: i.SerializeToString() for i in ours.graph.initializer} == {
        i.name: i.SerializeToString() for i in usual.graph.initializer
    }
    assert onnx.load(tmp_path / "ours.onnx").ByteSize() == (tmp_path / "ours.onnx").stat().st_size
    assert len(weightless(model).SerializeToString()) < (tmp_path / "ours.onnx").stat().st_size / 3
    ort.InferenceSession(str(tmp_path / "ours.onnx"), providers=["CPUExecutionProvider"])


def prepared(parts: dict[TowerName, Exported], count: int) -> PreparedSet:
    image, text = parts[TowerName.IMAGE], parts[TowerName.TEXT]
    return PreparedSet(
        ids=tuple(map(str, range(count))), concepts=("c",) * count, zero_shot={},
        safe_pixels=rows(image, count, 1), unsafe_pixels=rows(image, count, 2),
        safe_ids=rows(text, count, 1), unsafe_ids=rows(text, count, 2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[TowerName, Exported]:
    from tests.onnx.conftest import make_edited

    parts = {}
    for name in TowerName:
        folder = tmp_path_factory.mktemp(name.value)
        case = make_edited(name)
        parts[name] = Exported(case, case.export(folder), folder)
    return parts


@pytest.mark.parametrize("flips", [0.5, 100.0])
def test_auto_returns_only_what_decisions_depend_on(
    both: dict[TowerName, Exported], tmp_path: Path, flips: float
) -> None:
    """The plan keeps the budget on what it was measured on; with a budget that allows everything it keeps nothing."""
    sources = {
        name: Source(part.artifact, part.folder / part.artifact.file, ranges_for(part, tmp_path))
        for name, part in both.items()
    }
    spec = AutoSpec(lowest=Precision.INT8, flips=flips, items=200)
    plan = search(sources, prepared(both, 200), spec, (), tmp_path, lambda *_: None)
    assert plan.expected <= plan.limit <= flips
    assert plan.n == 200
    layers = {name: set(linear_layers(ir.load(source.path))) for name, source in sources.items()}
    assert {(layer.tower, layer.name) for layer in plan.layers} == {
        (t, n) for t, names in layers.items() for n in names
    }
    # Where everything in INT8 keeps the budget, the search is over before it asks what each layer does.
    assert all((layer.sensitivity > 0) == (flips < 100) for layer in plan.layers)
    kept = sum(len(names) for names in plan.kept.values())
    assert kept == sum(layer.kept for layer in plan.layers)
    assert plan.steps[0].what == "all lowered"
    assert (plan.steps[-1].flips, plan.steps[-1].expected) == (plan.flips, plan.expected)
    if flips == 100.0:
        assert (kept, plan.low_share) == (0, 1.0)
    else:
        assert plan.steps[0].expected > plan.limit
        assert kept > 0
        assert plan.low_share < 1
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(("flips", "to_float32"), [(0.2, True), (0.25, True), (0.5, True), (0.2, False)])
def test_second_terms_come_before_float32(
    both: dict[TowerName, Exported], tmp_path: Path, flips: float, to_float32: bool
) -> None:
    """Calibrated INT8 has a step more; without float32 it is the only one, and a plan ends with it in all layers at most.

    Where the first guesses miss the budget, further ones find a plan that keeps it, and not float32 in all layers.
    """
    sources = {}
    for name, part in both.items():
        path = part.folder / part.artifact.file
        chosen = chosen_for(path, one_row_layers(path), (), [rows(part, 8, seed) for seed in (1, 2)], tmp_path)
        ranges = dataclasses.replace(ranges_for(part, tmp_path), chosen=chosen)
        sources[name] = Source(part.artifact, path, ranges, float32=one_row_layers(path))
    spec = AutoSpec(lowest=Precision.INT8, flips=flips, items=100)
    plan = search(sources, prepared(both, 100), spec, (), tmp_path, lambda *_: None, to_float32=to_float32)
    two = [layer for name in TowerName for layer in plan.two_terms(name)]
    kept = [layer for names in plan.kept.values() for layer in names]
    assert len(two) + len(kept) <= len(plan.layers)
    assert plan.steps[-1].twice == plan.twice <= plan.low_share
    if to_float32:
        assert kept
        assert plan.expected <= plan.limit
        assert plan.low_share > 0
    else:
        assert two
        assert not kept
        assert plan.low_share == 1
        assert plan.expected < plan.steps[0].expected


def test_the_next_plan_is_foreseen() -> None:
    """Between plans, from both ends once both are measured; in the middle where nothing seems enough; never an end."""
    left = np.array([1.0, 0.81, 0.5, 0.25, 0.09, 0.01, 0.0])
    assert _between(left, 1.0, None, 0.5) == 3
    assert _between(left, 1.0, 0.4, 0.5) == 4
    assert _between(left, 1.0, None, 2.0) == 1
    assert _between(left, 1.0, 0.9, 0.5) == 3
    assert _between(left, 1.0, None, 0.0) == 5
    assert _between(np.zeros(3), 1.0, None, 0.5) == 1


def test_auto_kept_layers_stand_in_the_record(both: dict[TowerName, Exported], tmp_path: Path) -> None:
    """The graph of a plan has exactly the plan's layers in float32."""
    part = both[TowerName.IMAGE]
    kept = (part.case.edits[0].name.removesuffix(".weight"),)
    graph = convert(part, tmp_path, Precision.INT8, asked=Precision.AUTO, layers=kept)
    assert graph.conversion is not None
    assert graph.conversion.kept == kept
    assert graph.conversion.achieved["linear"]["fp32"] == 1


def test_a_tower_whose_layers_all_stay_in_float32_compiles(both: dict[TowerName, Exported], tmp_path: Path) -> None:
    """Where a budget leaves none in INT8, the engine is what the record says."""
    part = both[TowerName.IMAGE]
    kept = tuple(linear_layers(ir.load(part.folder / part.artifact.file)))
    graph = convert(part, tmp_path / "graphs", Precision.INT8, asked=Precision.AUTO, layers=kept)
    assert graph.conversion is not None
    assert set(graph.conversion.achieved["linear"]) == {"fp32"}
    (tmp_path / "engine").mkdir()
    engine = engine_from_onnx(
        graph, tmp_path / "graphs", Target.ONNXRUNTIME, PROFILE, part.case.edits, tmp_path / "engine"
    )
    assert engine.settings["weights"] == "float32"
