"""Weights that constant folding may remove: a compiler computes with them ahead of time, and keeps only the result."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

_KEEPS = ("Cast", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators behind which a weight can still be found by its values."""


def computed_away(path: Path) -> frozenset[str]:
    """Names of initialisers that constant folding removes, because all their readers compute constants.

    An example is a learned query, which is normalised and multiplied by a weight without any input. The weights of linear
    layers stay, transposed or in 8 bits: they are multiplied by activations.

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

    def folded(value: ir.Value) -> bool:
        """Weight or bias of a normalisation that takes up the factors behind it (`graphs.norm_folding`)."""
        norms = [node for node, _ in value.uses() if node.op_type == "LayerNormalization"]
        after = [node for norm in norms for node, _ in norm.outputs[0].uses()]
        return [node.op_type for node in after] == ["Mul"] and after[0].inputs[1] in constant

    return frozenset(name for name, value in model.graph.initializers.items() if gone(value) or folded(value))
