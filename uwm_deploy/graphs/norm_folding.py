"""Folds what scales and moves the channels of a normalisation's result into the normalisation itself: two passes less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

_NORMALISED = "LayerNormalization"


def fold_into_norms(model: onnx.ModelProto, folder: Path) -> int:
    """Folds in place; only where nothing else reads the result, its weight or its bias.

    Args:
        model: Float32 or mixed graph; its external data need not be loaded.
        folder: Folder of the external data; the tensors that change are inside the graph afterwards.

    Returns:
        Number of operators that went.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    outputs = {value.name for value in model.graph.output}
    gone: set[str] = set()
    for norm in [node for node in model.graph.node if node.op_type == _NORMALISED and len(node.input) > 2]:
        own = [tensors.get(name) for name in norm.input[1:3]]
        if any(one is None or len(users[one.name]) > 1 for one in own):
            continue
        weight, bias = (_array(one, folder) for one in own if one is not None)
        before = len(gone)
        while (after := _only(users.get(norm.output[0], []))) is not None and norm.output[0] not in outputs:
            other = tensors.get(after.input[1]) if after.op_type in ("Mul", "Add") else None
            if other is None or after.input[0] != norm.output[0] or list(other.dims) != list(weight.shape):
                break
            array = _array(other, folder)
            weight, bias = (weight * array, bias * array) if after.op_type == "Mul" else (weight, bias + array)
            norm.output[0] = after.output[0]
            gone.add(after.output[0])
        if len(gone) == before:
            continue
        for tensor, array in zip(own, (weight, bias), strict=True):
            assert tensor is not None
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    _remove(model, gone)
    return len(gone)


def _only(found: list[onnx.NodeProto]) -> onnx.NodeProto | None:
    return found[0] if len(found) == 1 else None


def _array(tensor: TensorProto, folder: Path) -> np.ndarray:
    """In float64, so that one rounding is left: (k,)."""
    if tensor.data_location == TensorProto.EXTERNAL:
        load_external_data_for_tensor(tensor, str(folder))
    array: np.ndarray = numpy_helper.to_array(tensor).astype(np.float64)
    return array


def _remove(model: onnx.ModelProto, gone: set[str]) -> None:
    """Takes nodes out, and the constants that nothing reads any more."""
    kept = [node for node in model.graph.node if node.op_type == _NORMALISED or node.output[0] not in gone]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    used = {name for node in kept for name in node.input} | {value.name for value in model.graph.output}
    left = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(left)
