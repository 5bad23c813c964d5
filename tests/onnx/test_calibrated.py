"""INT8 that is chosen on calibration inputs: channels get scales of their own, weights are rounded together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.onnx.conftest import Exported
from tests.onnx.test_precision import PROFILE, convert, ranges_for, reference, rows
from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.achieved_precision import achieved_precision, low_share
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.quantise import quantise_graph
from uwm_deploy.graphs.rounding import PAIR, fits, is_rounded, paired_scale, rounded_by_moments
from uwm_deploy.graphs.smoothing import Channels, Chosen, chosen_in
from uwm_deploy.graphs.two_terms import second_name
from uwm_deploy.records.evidence import GraphAudit
from uwm_deploy.records.graph import CALIBRATED, OnnxArtifact, Precision, Target
from uwm_deploy.runtime.session import open_engine
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.convert.calibrate import chosen_for, one_row_layers
from uwm_deploy.stages.convert.convert import Ranges, embed_with
from uwm_deploy.stages.verify.anew import converted_anew

CLEAN = GraphAudit(layers=0, weights=0)


def correlated(count: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    few: np.ndarray = rng.normal(size=(count, 3)) @ rng.normal(size=(3, size)) + 0.05 * rng.normal(size=(count, size))
    return few


@pytest.mark.parametrize("size", [31, 96, 130])
def test_rounding_together_moves_outputs_less_and_never_overflows(size: int) -> None:
    """Every entry is one of its neighbours, with its sign; two neighbours fit into 16 bits; less error than the nearest."""
    inputs = correlated(400, size)
    weight = np.random.default_rng(1).normal(size=(24, size)).astype(np.float32)
    codes = rounded_by_moments(weight, inputs.T @ inputs / len(inputs))
    scale = paired_scale(weight)[:, None]
    assert is_rounded(weight, codes)
    assert fits(codes.T)
    even = np.abs(codes[:, : size // 2 * 2].astype(int))
    assert (even[:, 0::2] + even[:, 1::2]).max() <= PAIR
    nearest = np.rint(weight / scale)
    errors = [float(np.abs(inputs @ (weight - one * scale).T).mean()) for one in (codes, nearest)]
    assert errors[0] < 0.9 * errors[1]
    assert np.array_equal(paired_scale(np.abs(weight)), paired_scale(weight))
    wrong = codes.copy()
    wrong[3, 5] += 2
    assert not is_rounded(weight, wrong)
    flipped = np.where(np.abs(codes) > 1, -codes, codes)
    assert not is_rounded(weight, flipped)


def test_weights_that_would_overflow_do_not_fit() -> None:
    """Two neighbours of 64 and 65 are too much; apart they are not, nor is the last of an odd number."""
    assert fits(np.array([[64], [64], [127]], np.int8))
    assert not fits(np.array([[64], [65]], np.int8))
    assert not fits(np.array([[-64], [65]], np.int8))
    assert fits(np.array([[1], [127], [1], [127]], np.int8))


@pytest.fixture
def calibrated(exported: Exported, tmp_path: Path) -> Ranges:
    source, found = exported.folder / exported.artifact.file, ranges_for(exported, tmp_path)
    batches = [rows(exported, 8, seed) for seed in (1, 2, 3)]
    return dataclasses.replace(found, chosen=chosen_for(source, one_row_layers(source), (), batches, tmp_path))


def converted_with(exported: Exported, folder: Path, ranges: Ranges, *more: str) -> OnnxArtifact:
    kept = one_row_layers(exported.folder / exported.artifact.file)
    return convert(exported, folder, Precision.INT8, ranges=ranges, patterns=(*kept, *more))


def test_a_calibrated_graph_can_be_made_anew(exported: Exported, calibrated: Ranges, tmp_path: Path) -> None:
    """Near float32; equal bytes twice; anew the same; a tampered weight is named."""
    graph = converted_with(exported, tmp_path / "one", calibrated)
    assert graph.conversion is not None
    assert graph.conversion.quantiser == CALIBRATED
    assert graph.fingerprint.layers == len(exported.case.edits)
    assert converted_with(exported, tmp_path / "two", calibrated).digest == graph.digest
    found = embed_with(graph, tmp_path / "one" / graph.file, Precision.INT8, [rows(exported, 8)])
    assert (found * reference(exported, 8)).sum(1).min() > 0.99
    source, path = exported.folder / exported.artifact.file, tmp_path / "one" / graph.file
    assert not converted_anew(CLEAN, path, graph, source).structure
    model = ir.load(path)
    assert chosen_in(model, ir.load(source)).per_token == calibrated.chosen.per_token
    layer = next(iter(calibrated.chosen.codes))
    value = model.graph.initializers[f"{layer}.weight"]
    assert value.const_value is not None
    codes = np.array(value.const_value.numpy())
    codes[0, 0] += 3 if codes[0, 0] < 0 else -3
    value.const_value = ir.tensor(codes, name=value.name)
    with pytest.raises(ContractError, match=layer):
        chosen_in(model, ir.load(source))
    ir.save(model, path)
    assert layer in " ".join(converted_anew(CLEAN, path, graph, source).structure)


def test_a_layer_that_stays_in_float32_keeps_its_weight(exported: Exported, calibrated: Ranges, tmp_path: Path) -> None:
    """Query in float32 beside key and value in INT8: it reads the activation as it was, and the edit is found in all."""
    name = next(name for name in calibrated.chosen.codes if name.endswith("q_proj"))
    graph = converted_with(exported, tmp_path / "kept", calibrated, name)
    model, source = ir.load(tmp_path / "kept" / graph.file), ir.load(exported.folder / exported.artifact.file)
    values = [m.graph.initializers[f"{name}.weight"].const_value for m in (model, source)]
    assert np.array_equal(values[0].numpy(), values[1].numpy())
    file = exported.folder / exported.artifact.file
    assert not converted_anew(CLEAN, tmp_path / "kept" / graph.file, graph, file).structure
    assert achieved_precision(model)["linear"]["fp32"] > 1


def one_layer(*, two_terms: bool = False, per_token: bool = True) -> ir.Model:
    """A multiplication by 64 steps of the weight, in INT8."""
    weight = ir.tensor(np.eye(3, dtype=np.float32), name="w.weight")
    x, w = (
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in (("x", ["n", 3]), ("w.weight", [3, 3]))
    )
    w.const_value = weight
    same = ir.node("Identity", [x], name="same")
    same.outputs[0].name, same.outputs[0].dtype, same.outputs[0].shape = "a", ir.DataType.FLOAT, ir.Shape(["n", 3])
    layer = ir.node("MatMul", [same.outputs[0], w], name="w")
    layer.outputs[0].name, layer.outputs[0].dtype, layer.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape(["n", 3])
    graph = ir.Graph([x], [layer.outputs[0]], nodes=[same, layer], initializers=[w], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    channels = Channels(factor=np.ones(3, np.float32), shift=None)
    chosen = Chosen(
        channels={"a": channels},
        codes={"w": 64 * np.eye(3, dtype=np.int8)},
        per_token=frozenset(["a"] if per_token else []),
        two_terms=frozenset(["w"] if two_terms else []),
    )
    quantise_graph(model, set(linear_layers(model)), {"a.spread": 1.0}, "int8", chosen)
    return model


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_a_token_of_any_size_is_rounded_alike(scale: float) -> None:
    """A row of zeros stays zeros; one far beyond the others is not cut off, and each row has its own steps."""
    model = one_layer()
    rows = np.array([[1.0, -0.5, 0.25], [scale, 0.3 * scale, 0.0]], np.float32)
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    found = session.run(None, {"x": rows})[0] / 64 / paired_scale(np.eye(3, dtype=np.float32))[0]
    assert (np.abs(found - rows) <= np.abs(rows).max(1, keepdims=True) / 200).all()  # half a step, and a little more


def test_a_second_term_leaves_the_rounding_of_the_weight_alone(
    exported: Exported, calibrated: Ranges, tmp_path: Path
) -> None:
    """With two terms a graph is nearer; layers are counted once, read back, and made anew the same."""
    layers, source = sorted(calibrated.chosen.codes), exported.folder / exported.artifact.file
    made = {}
    for name, two in (("none", []), ("one", layers[:1]), ("all", layers)):
        graph = converted_with(exported, tmp_path / name, calibrated.with_two_terms(two))
        made[name] = embed_with(graph, tmp_path / name / graph.file, Precision.INT8, [rows(exported, 8)])
        model = ir.load(tmp_path / name / graph.file)
        linear = achieved_precision(model)["linear"]
        assert (linear.get("int8-two-terms", 0), linear.get("int8", 0)) == (len(two), len(layers) - len(two))
        assert low_share({"linear": linear}, "int8") == len(layers) / sum(linear.values())
        assert graph.conversion is not None
        assert graph.conversion.two_terms == tuple(two)
        assert graph.fingerprint.layers == len(exported.case.edits)
        assert not converted_anew(CLEAN, tmp_path / name / graph.file, graph, source).structure
    wanted = reference(exported, 8)
    errors = {name: float(np.abs(found - wanted).mean()) for name, found in made.items()}
    assert errors["all"] < 0.9 * errors["none"]
    assert not np.array_equal(made["one"], made["none"])


def other_steps(model: ir.Model, layer: str) -> None:
    """The second term in steps of another size."""
    product = next(node for node in model.graph if node.name == second_name(f"{layer}.weight"))
    scale = product.inputs[0].producer().inputs[1]  # type: ignore[union-attr]
    assert scale is not None
    scale.const_value = ir.tensor(2 * scale.const_value.numpy(), name=scale.name)  # type: ignore[union-attr]


def left_out(model: ir.Model, layer: str) -> None:
    """The first term alone, which the record does not say."""
    product = next(node for node in model.graph if node.name == second_name(f"{layer}.weight"))
    added = next(user for user, _ in product.outputs[0].uses())
    ir.convenience.replace_all_uses_with(added.outputs[0], added.inputs[0])  # type: ignore[arg-type]
    model.graph.remove([added, product], safe=True)


def taken_away(model: ir.Model, layer: str) -> None:
    """Subtracted instead of added."""
    product = next(node for node in model.graph if node.name == second_name(f"{layer}.weight"))
    next(user for user, _ in product.outputs[0].uses()).op_type = "Sub"


@pytest.mark.parametrize("tamper", [other_steps, left_out, taken_away])
def test_a_wrong_second_term_is_seen(
    exported: Exported, calibrated: Ranges, tmp_path: Path, tamper: Callable[[ir.Model, str], None]
) -> None:
    """The graph differs from the one that is made anew as the record says."""
    layer, source = sorted(calibrated.chosen.codes)[0], exported.folder / exported.artifact.file
    graph = converted_with(exported, tmp_path, calibrated.with_two_terms([layer]))
    model = ir.load(tmp_path / graph.file)
    tamper(model, layer)
    ir.save(model, tmp_path / graph.file)
    assert converted_anew(CLEAN, tmp_path / graph.file, graph, source).structure


def test_two_terms_together_have_15_bits() -> None:
    """A product of two terms is off by 1 / 254 of half a step, whatever the size of the row; a row of zeros gives zeros."""
    model, rows = (
        one_layer(two_terms=True),
        np.array([[1.0, -0.5, 0.123], [3e4, -1e4, 7.0], [0.0, 0.0, 0.0]], np.float32),
    )
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    found = session.run(None, {"x": rows})[0] / 64 / paired_scale(np.eye(3, dtype=np.float32))[0]
    assert (np.abs(found - rows) <= np.abs(rows).max(1, keepdims=True) / 60_000).all()


def test_no_second_term_without_a_scale_per_token() -> None:
    """What one scale for all rows leaves of an input beyond its range has no bound."""
    with pytest.raises(ContractError, match="no scale per token"):
        one_layer(two_terms=True, per_token=False)


def test_rows_with_two_terms_do_not_depend_on_their_batch(
    exported: Exported, calibrated: Ranges, tmp_path: Path
) -> None:
    """In the engine of a CPU: both products are of integers, the weight is there once, a row alone is the row in a batch."""
    graph = converted_with(exported, tmp_path / "graph", calibrated.with_two_terms(calibrated.chosen.codes))
    (tmp_path / "engine").mkdir()
    engine = engine_from_onnx(
        graph, tmp_path / "graph", Target.ONNXRUNTIME, PROFILE, exported.case.edits, tmp_path / "engine"
    )
    path = tmp_path / "engine" / engine.file
    session = open_engine(engine, path.read_bytes(), {}, device="cpu")
    batch = rows(exported, 5)
    together, alone = session.run(batch), np.concatenate([session.run(batch[row : row + 1]) for row in range(5)])
    assert np.abs(together - alone).max() < 1e-6
    assert (together * reference(exported, 5)).sum(1).min() > 0.99
    model = ir.load(path)
    products = [node.inputs[1] for node in model.graph if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 2 * len(calibrated.chosen.codes) == 2 * len(set(products))


def test_an_edited_bias_is_not_moved(exported: Exported, tmp_path: Path) -> None:
    """A bias that must stay as it is takes no shift; its activation is scaled only."""
    source = exported.folder / exported.artifact.file
    biases = {name for name in ir.load(source).graph.initializers if name.endswith("fc1.bias")}
    chosen = chosen_for(source, one_row_layers(source), biases, [rows(exported, 8, 1)], tmp_path)
    still = [channels for channels in chosen.channels.values() if channels.shift is None]
    assert 0 < len(still) < len(chosen.channels)


def test_the_engine_for_a_cpu_holds_the_same_weights(exported: Exported, calibrated: Ranges, tmp_path: Path) -> None:
    """They fit as they are, so nothing is narrowed; what scales channels goes into the normalisation before it."""
    graph = converted_with(exported, tmp_path / "graph", calibrated)
    (tmp_path / "engine").mkdir()
    engine = engine_from_onnx(
        graph, tmp_path / "graph", Target.ONNXRUNTIME, PROFILE, exported.case.edits, tmp_path / "engine"
    )
    path = tmp_path / "engine" / engine.file
    session = open_engine(engine, path.read_bytes(), {}, device="cpu")
    assert (session.run(rows(exported, 5)) * reference(exported, 5)).sum(1).min() > 0.98
    held = [value.const_value.numpy() for value in ir.load(path).graph.initializers.values() if value.const_value]
    wide = [array for array in held if array.dtype == np.int8 and array.ndim == 2]
    assert wide
    assert max(int(np.abs(array.astype(int)).max()) for array in wide) > 64
    operators = [node.op_type for node in ir.load(path).graph]
    before = [node.op_type for node in ir.load(tmp_path / "graph" / graph.file).graph]
    assert operators.count("Mul") < before.count("Mul")
