"""Changes a graph with 8-bit weights so that ONNX Runtime turns them into float32 at the speed of memory.

Its kernel for one scale per output channel goes entry by entry; the one for blocks goes row by row, and is about five times
as fast. One block that is as long as the weight has the same scales and gives the same numbers.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

_OPSET = 21
"""The first one with blocks; nothing else that a graph for ONNX Runtime holds computes otherwise in it."""


def in_one_block(model: onnx.ModelProto) -> int:
    """Gives every 8-bit weight one block per output channel, in place; its external data need not be loaded.

    Args:
        model: Graph whose weights have a scale per output channel.

    Returns:
        Number of weights.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = 0
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        weight, scales = tensors[node.input[0]], [tensors[name] for name in node.input[1:] if name in tensors]
        if weight.data_type != TensorProto.INT8 or len(weight.dims) != 2 or len(scales[0].dims) != 1:
            continue
        along = 1 - _axis(node)
        for tensor in scales:
            tensor.dims.insert(along, 1)
        del node.attribute[:]
        node.attribute.extend(
            [onnx.helper.make_attribute("axis", along), onnx.helper.make_attribute("block_size", weight.dims[along])]
        )
        changed += 1
    for version in model.opset_import:
        if changed and version.domain in ("", "ai.onnx"):
            version.version = max(version.version, _OPSET)
    return changed


def _axis(node: onnx.NodeProto) -> int:
    """Axis of the output channels."""
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
