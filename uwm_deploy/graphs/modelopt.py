"""Graphs that nvidia-modelopt quantised, brought into the form of our own: 8-bit weights under their own names."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from uwm_deploy.errors import ContractError, PrerequisiteError
from uwm_deploy.graphs.child import made_by_child
from uwm_deploy.graphs.layers import LINEAR, linear_layers, matching_nodes
from uwm_deploy.graphs.quantise import Kind, rounded_weight
from uwm_deploy.graphs.write import write_graph

Method = Literal["entropy", "max"]

_QUANTISER = "uwm_deploy.graphs.modelopt_quantiser"
_TYPE = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


def missing_modelopt() -> str:
    """Empty when nvidia-modelopt is installed, else what is missing."""
    return "" if importlib.util.find_spec("modelopt") else "package nvidia-modelopt is not installed"


def quantised_by_modelopt(
    source: Path, kind: Kind, method: Method, patterns: Sequence[str], rows: Iterable[np.ndarray], folder: Path
) -> tuple[ir.Model, str]:
    """Quantises the linear layers of a graph.

    Args:
        source: Float32 ONNX file.
        kind: 8-bit type.
        method: How ranges of activations are found.
        patterns: Globs over layers, nodes and operators that stay in float32.
        rows: Calibration inputs, (b, ...) each.
        folder: For its files; its log and settings stay, inputs and graphs do not.

    Returns:
        The graph, and the version of modelopt.

    Raises:
        PrerequisiteError: If modelopt is not installed.
        ContractError: If it fails, or what it gives is not the graph with some layers quantised.
    """
    if reason := missing_modelopt():
        raise PrerequisiteError(f"compile.quantiser: {reason}", fix="pip install 'uwm-deploy[quantize]'")
    model, original = ir.load(source), ir.load(source)
    keep = matching_nodes(model, patterns)
    low = {name for name, layer in linear_layers(model).items() if layer.node not in keep}
    _turn_weights(model, low)
    stem = source.name.removesuffix(".onnx")
    given, made, inputs = (f".given-{source.name}", f".made-{source.name}", f".rows-{stem}.npz")
    external = f"{given}.data" if source.with_name(f"{source.name}.data").is_file() else ""
    try:
        write_graph(model, folder / given, external)
        np.savez(folder / inputs, rows=np.concatenate(list(rows)))
        spec = {
            "onnx": given,
            "engine": made,
            "external": bool(external),
            "mode": kind,
            "method": method,
            "rows": inputs,
            "input": model.graph.inputs[0].name,
            "exclude": _excluded(model, low),
        }
        version = made_by_child(_QUANTISER, spec, "modelopt", stem, folder, "quantise")["version"]
        result = ir.load(folder / made)
        ir.external_data.load_to_model(result)
    finally:
        for left in (*folder.glob(f".given-{stem}*"), *folder.glob(f"*.made-{stem}*"), folder / inputs):
            left.unlink(missing_ok=True)
    fold_weights(result, kind)
    _check_rest(original, result, low)
    return result, str(version)


def _turn_weights(model: ir.Model, layers: Set[str]) -> None:
    """Weights in the orientation of their multiplication: behind a Transpose, modelopt takes them for activations."""
    for layer in [layer for name, layer in linear_layers(model).items() if name in layers]:
        if layer.transpose is None:
            continue
        if len(list(layer.weight.uses())) > 1:
            raise ContractError(f"weight {layer.weight.name} is used more than once", fix="leave its layer out")
        assert layer.weight.const_value is not None
        turned = np.ascontiguousarray(layer.weight.const_value.numpy().T)
        layer.weight.const_value = ir.tensor(turned, name=layer.weight.name)
        layer.weight.shape = ir.Shape(turned.shape)
        layer.node.replace_input_with(1, layer.weight)
        model.graph.remove(layer.transpose, safe=True)


def _excluded(model: ir.Model, layers: Set[str]) -> list[str]:
    """Patterns for the multiplications that stay as they are: other layers, and products of activations."""
    low = {layer.node for name, layer in linear_layers(model).items() if name in layers}
    names = [node.name or "" for node in model.graph if node.op_type in LINEAR and node not in low]
    return [f"^{re.escape(name)}$" for name in names]


def fold_weights(model: ir.Model, kind: Kind) -> None:
    """Rounds weights that are float32 with a Q and a DQ behind them, in place, and gives each multiplication DQs of its own.

    Raises:
        ContractError: If something else than a weight is quantised, or not symmetrically.
    """
    for node in [node for node in model.graph if node.op_type in LINEAR]:
        weight_side, input_side = (_producer(node.inputs[index]) for index in (1, 0))
        if weight_side is None or weight_side.op_type != "DequantizeLinear":
            continue
        before = _producer(weight_side.inputs[0])
        if before is None or before.op_type != "QuantizeLinear" or input_side is None:
            raise ContractError(f"{node.name} is not quantised on both sides", fix="report this")
        weight, scale, zero = before.inputs
        if weight is None or not weight.is_initializer() or weight.const_value is None or scale is None or zero is None:
            raise ContractError(f"the weight of {node.name} is not in the graph", fix="report this")
        if np.asarray(_array(zero), np.float32).any():
            raise ContractError(f"{weight.name} has a zero point, which TensorRT does not take", fix="report this")
        axis = before.attributes.get_int("axis", 1) if _array(scale).size > 1 else 1
        step = _array(scale) if _array(scale).size > 1 else _array(scale).reshape(())
        rounded = rounded_weight(np.asarray(weight.const_value.numpy(), np.float32), step, axis, kind)
        weight.const_value = ir.tensor(rounded, dtype=_TYPE[kind], name=weight.name)
        weight.dtype = _TYPE[kind]
        _own_dq(model, node, 1, weight, weight_side)
        _own_dq(model, node, 0, input_side.inputs[0], input_side)
    common.RemoveUnusedNodesPass()(model)
    for part in (model, model.graph, *model.graph):
        part.metadata_props.clear()
        part.doc_string = None


def _own_dq(model: ir.Model, node: ir.Node, index: int, value: ir.Value | None, like: ir.Node) -> None:
    """ONNX Runtime fuses a multiplication only with a DQ of its own."""
    old = node.inputs[index]
    assert old is not None
    copy = ir.node("DequantizeLinear", [value, *like.inputs[1:]], dict(like.attributes), name=f"dq{index}_{node.name}")
    copy.outputs[0].name, copy.outputs[0].dtype = f"{node.name}.dequantised{index}", ir.DataType.FLOAT
    copy.outputs[0].shape = old.shape
    model.graph.insert_before(node, copy)
    node.replace_input_with(index, copy.outputs[0])


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _array(value: ir.Value) -> np.ndarray:
    """A constant, as an initialiser or as a node."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ContractError(f"{value.name} is not a constant", fix="report this")
    return np.asarray(tensor.numpy())


def _check_rest(source: ir.Model, made: ir.Model, low: Set[str]) -> None:
    """All other tensors are those of the source, under their names, and so are inputs and outputs."""
    changed = {layer.weight.name for name, layer in linear_layers(source).items() if name in low}
    for name, value in source.graph.initializers.items():
        other = made.graph.initializers.get(name)
        assert value.const_value is not None
        if other is None or other.const_value is None:
            raise ContractError(f"modelopt left no tensor {name}", fix="use quantiser = 'built-in'")
        if name not in changed and not np.array_equal(value.const_value.numpy(), other.const_value.numpy()):
            raise ContractError(f"modelopt changed {name}, which is not quantised", fix="use quantiser = 'built-in'")
    for side in ("inputs", "outputs"):
        ends = [[(v.name, v.dtype) for v in getattr(model.graph, side)] for model in (source, made)]
        if ends[0] != ends[1]:
            raise ContractError(f"modelopt changed the {side}: {ends[1]}", fix="use quantiser = 'built-in'")
