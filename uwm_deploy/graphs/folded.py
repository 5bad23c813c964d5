"""Weights that a compiler may compute away: nothing but constants is made from them, and it keeps what comes out."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

_KEEPS = ("Cast", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators behind which a weight is still found by its values."""


def computed_away(path: Path) -> frozenset[str]:
    """Names of initialisers that are gone when everything that can be computed without an input has been.

    Such as a learned query, which is normalised and multiplied by a weight before any image is seen. Not the weights of the
    linear layers: turned or in 8 bits, they are multiplied by activations.

    Args:
        path: ONNX file.
    """
    model = ir.load(path)
    constant = {value for value in model.graph.initializers.values() if value.const_value is not None}
    for node in model.graph:
        if node.op_type == "Constant" or (node.inputs and all(v is None or v in constant for v in node.inputs)):
            constant.update(node.outputs)

    def gone(value: ir.Value) -> bool:
        users = [node for node, _ in value.uses()]
        return bool(users) and all(
            constant.issuperset(node.outputs) and (node.op_type not in _KEEPS or all(map(gone, node.outputs)))
            for node in users
        )

    return frozenset(name for name, value in model.graph.initializers.items() if gone(value))
