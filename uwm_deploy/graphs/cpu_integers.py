"""Changes an INT8 graph so that ONNX Runtime multiplies in 8 bits on every processor, with the same sums on each.

ONNX Runtime's kernels take unsigned activations and signed weights. On x86 without 8-bit instructions (VNNI) they add two
products in 16 bits, which overflows silently: 255 * 127 * 2 is twice the largest number. On the demo the overflow changed
about as many decisions as all of the rounding did (2.3% in all, 1.2% without it), and a bundle that was measured on one
processor gave other sums on another. With weights of 7 bits, -64 to 64, no sum overflows anywhere; nor does one of weights
that were rounded with that in mind (`graphs.rounding`), which stay as they are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from uwm_deploy.graphs.norm_folding import fold_into_norms
from uwm_deploy.graphs.rounding import fits

LARGEST = 64
"""Largest absolute value of a weight: 255 * 64 * 2 fits into a signed 16-bit number, 255 * 65 * 2 does not."""

_STEP = 127 / LARGEST

_WITHOUT_BIAS = 6
"""Number of inputs of ONNX Runtime's MatMulIntegerToFloat without a bias: factors, scales and zero points."""


def narrowed(weight: np.ndarray) -> np.ndarray:
    """Rounds an 8-bit weight to 7 bits; an entry that is not 0 keeps its sign.

    Args:
        weight: int8, any shape, -127 to 127.

    Returns:
        int8, any shape (that of the weight), -64 to 64.
    """
    found: np.ndarray = np.rint(weight / _STEP).clip(-LARGEST, LARGEST).astype(np.int8)
    return found


def stored_forms(weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """Forms in which a compiled graph may store a weight of lower precision: unchanged, and for INT8 in 7 bits, too.

    Args:
        weight: Any dtype and any shape.

    Returns:
        One or two arrays with the dtype and any shape of the weight.
    """
    return (weight, narrowed(weight)) if weight.dtype == np.int8 else (weight,)


def fit_for_cpu(model: onnx.ModelProto, folder: Path) -> list[str]:
    """Makes activations unsigned and weights fit, in place; nodes that are not in 8 bits stay as they are.

    Args:
        model: Graph with explicit, symmetric quantisation; its external data need not be loaded.
        folder: Folder of the external data; the weights that change are inside the graph afterwards.

    Returns:
        Names of weights that cannot be narrowed, because another node reads them or their scale; a graph with such a
        weight must not be used.
    """
    fold_into_norms(model, folder)
    _unsign_activations(model)
    return _narrow_weights(model, folder)


def add_biases(model: onnx.ModelProto) -> int:
    """Lets 8-bit multiplications add their bias themselves, in place: the same numbers with one pass over memory less.

    Args:
        model: Graph that ONNX Runtime has optimised.

    Returns:
        Number of multiplications that do.
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
    """Makes activations unsigned by moving their zero point from 0 to 128; they represent the same numbers.

    ONNX Runtime does it by itself, except where several layers read one activation (query, key and value): there it computes
    in float32, and converts the weights in every call.
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
            wide.append(weight.name)  # its other readers expect the old values
            continue
        for tensor in (weight, scale):
            if tensor.data_location == TensorProto.EXTERNAL:
                load_external_data_for_tensor(tensor, str(folder))
        array = numpy_helper.to_array(weight)
        if fits(array if _axis(node) == 1 else array.T):
            continue
        _put(weight, narrowed(array))
        _put(scale, numpy_helper.to_array(scale) * np.float32(_STEP))
    return wide


def _axis(node: onnx.NodeProto) -> int:
    """Axis of the output channels."""
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)


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
