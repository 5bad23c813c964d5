"""Quantisation by nvidia-modelopt, and its graphs in the form of `quantise`: 8-bit weights under their own names."""

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
from uwm_deploy.graphs.child_process import made_by_child
from uwm_deploy.graphs.layers import LINEAR, linear_layers, matching_nodes
from uwm_deploy.graphs.quantise import EightBitType, rounded_weight
from uwm_deploy.graphs.write import write_graph

RangeMethod = Literal["entropy", "max"]

_QUANTISER = "uwm_deploy.graphs.modelopt_quantiser"
_TYPE = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


def missing_modelopt() -> str:
    """Empty when nvidia-modelopt is installed, else the reason why it cannot be used."""
    return "" if importlib.util.find_spec("modelopt") else "package nvidia-modelopt is not installed"


def quantised_by_modelopt(
    source: Path,
    kind: EightBitType,
    method: RangeMethod,
    patterns: Sequence[str],
    rows: Iterable[np.ndarray],
    folder: Path,
) -> tuple[ir.Model, str]:
    """Quantises the linear layers of a graph.

    Args:
        source: Float32 ONNX file.
        kind: 8-bit type.
        method: Calibration method for the ranges of activations.
        patterns: Globs over layers, nodes and operators that stay in float32.
        rows: Batches of calibration inputs, (b, ...) float32 pixels or int64 ids.
        folder: Folder for its files; its log and settings stay, inputs and graphs are removed.

    Returns:
        The graph, and the version of modelopt.

    Raises:
        PrerequisiteError: If modelopt is not installed.
        ContractError: If it fails, or changes more of the graph than the layers it should quantise.
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
    """Transposes weights ahead of time: behind a Transpose node, modelopt takes a weight for an activation."""
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
    """Patterns for the multiplications that are not quantised: other layers, and products of activations."""
    low = {layer.node for name, layer in linear_layers(model).items() if name in layers}
    names = [node.name or "" for node in model.graph if node.op_type in LINEAR and node not in low]
    return [f"^{re.escape(name)}$" for name in names]


def fold_weights(model: ir.Model, kind: EightBitType) -> None:
    """Replaces float32 weights behind a Q and a DQ by 8-bit ones behind a DQ, in place; no two multiplications share a DQ.

    Raises:
        ContractError: If a multiplication is quantised on one side only, without a weight, or not symmetrically.
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
    """Gives a multiplication a DQ of its own: ONNX Runtime fuses it only with a DQ that no other node reads."""
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
    """Value of a constant, which is an initialiser or a node."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ContractError(f"{value.name} is not a constant", fix="report this")
    return np.asarray(tensor.numpy())


def _check_rest(source: ir.Model, made: ir.Model, low: Set[str]) -> None:
    """Checks that all other tensors, and the inputs and outputs, are those of the source, under the same names."""
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
