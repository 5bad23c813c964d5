"""Makes an INT8 graph one that ONNX Runtime multiplies in 8 bits on every processor, with the same sums on each.

Its kernels take unsigned activations and signed weights. On x86 without instructions for 8 bits (VNNI) they add two products
in 16 bits, which overflows silently: 255 * 127 * 2 is twice the largest number. On the demo that flipped about as many
decisions as all of the rounding, 2.3% instead of 1.2%, and a bundle that was measured on one processor gave other sums on
another. With weights of 7 bits, -64 to 64, no sum overflows anywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

LARGEST = 64
"""Of a weight: 255 * 64 * 2 is within 16 bits with a sign, 255 * 65 * 2 is not."""

_STEP = 127 / LARGEST

_WITHOUT_BIAS = 6
"""Inputs of ONNX Runtime's MatMulIntegerToFloat: both factors, their scales and zero points; the bias is the seventh."""


def narrowed(weight: np.ndarray) -> np.ndarray:
    """An INT8 weight, -127 to 127, rounded to 7 bits; an entry that is not 0 keeps its sign."""
    found: np.ndarray = np.rint(weight / _STEP).clip(-LARGEST, LARGEST).astype(np.int8)
    return found


def stored_forms(weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """A lowered weight as graphs compiled from it may hold it: as it is, and one of INT8 in 7 bits."""
    return (weight, narrowed(weight)) if weight.dtype == np.int8 else (weight,)


def fit_for_cpu(model: onnx.ModelProto, folder: Path) -> list[str]:
    """Unsigned activations and weights of 7 bits, in place; whatever is not of 8 bits stays.

    Args:
        model: Graph with explicit quantisation, symmetric; its external data need not be loaded.
        folder: Where that is; the weights that change are inside the graph afterwards.

    Returns:
        Names of weights that could not be narrowed, because something else reads them or their scale: such a graph must
        not be used.
    """
    _unsign_activations(model)
    return _narrow_weights(model, folder)


def add_biases(model: onnx.ModelProto) -> int:
    """Lets multiplications in 8 bits add their bias themselves, in place: the same numbers in one pass less over them.

    Args:
        model: As ONNX Runtime optimised it.

    Returns:
        How many do.
    """
    tensors, users, outputs = _tensors(model), _users(model), {value.name for value in model.graph.output}
    added: list[str] = []
    for node in model.graph.node:
        if node.op_type != "MatMulIntegerToFloat" or len(node.input) != _WITHOUT_BIAS:
            continue
        readers = users.get(node.output[0], [])
        if len(readers) != 1 or readers[0].op_type != "Add" or node.output[0] in outputs:
            continue
        other = [name for name in readers[0].input if name != node.output[0]]
        columns = [tensors[node.input[1]].dims[-1]] if node.input[1] in tensors else []
        if len(other) == 1 and other[0] in tensors and list(tensors[other[0]].dims) == columns:
            node.input.append(other[0])
            added.append(node.output[0])
            node.output[0] = readers[0].output[0]
    kept = [node for node in model.graph.node if node.op_type != "Add" or not set(node.input) & set(added)]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return len(added)


def _unsign_activations(model: onnx.ModelProto) -> None:
    """Moves the zero of activations from 0 to 128: the same numbers.

    ONNX Runtime does it by itself, but not where several layers read one activation (query, key and value): those stayed in
    float32, and their weights were turned into float32 in every call.
    """
    tensors = _tensors(model)
    of_weights = {n.input[2] for n in _from_8_bits(model) if n.input[0] in tensors and len(n.input) > 2}
    zeros = {
        node.output[0]: tensors[node.input[2]]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and len(node.input) > 2 and node.input[2] in tensors.keys() - of_weights
    }
    signed = {name: zero for name, zero in zeros.items() if zero.data_type == TensorProto.INT8}
    of_activations = {zero.name: zero for zero in signed.values()}
    for zero in of_activations.values():
        shifted = numpy_helper.to_array(zero).astype(np.int16) + 128
        _put(zero, shifted.astype(np.uint8))
    for value in model.graph.value_info:
        if value.name in signed or value.name in of_activations:
            value.type.tensor_type.elem_type = TensorProto.UINT8


def _narrow_weights(model: onnx.ModelProto, folder: Path) -> list[str]:
    tensors, users = _tensors(model), _users(model)
    wide: list[str] = []
    for node in _from_8_bits(model):
        weight, scale = tensors.get(node.input[0]), tensors.get(node.input[1])
        if weight is None or weight.data_type != TensorProto.INT8:
            continue
        if scale is None or len(users[weight.name]) > 1 or len(users[scale.name]) > 1:
            wide.append(weight.name)  # what else reads it expects what it was
            continue
        for tensor in (weight, scale):
            if tensor.data_location == TensorProto.EXTERNAL:
                load_external_data_for_tensor(tensor, str(folder))
        _put(weight, narrowed(numpy_helper.to_array(weight)))
        _put(scale, numpy_helper.to_array(scale) * np.float32(_STEP))
    return wide


def _from_8_bits(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "DequantizeLinear"]


def _tensors(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _users(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in set(node.input):
            found.setdefault(name, []).append(node)
    return found


def _put(tensor: TensorProto, array: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
