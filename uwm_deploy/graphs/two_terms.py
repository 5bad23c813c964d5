"""A second term of 8 bits for what the first one leaves: an activation has 15 bits then, and kernels still multiply 8.

A row of an activation is at most 1 large (`graphs.token_scales`), so what rounding to 127 steps leaves is half a step. It is
rounded to 127 steps of its own. Both terms are multiplied by the same 8-bit weight, and the products are added: one
multiplication more for a layer, and no more weights. What is left is the rounding of the weight.
"""

from __future__ import annotations

import onnx_ir as ir

from uwm_deploy.graphs.layers import LinearLayer, read_instead

Quantised = tuple[ir.Value, ir.Value, ir.Value]
"""An activation in 8 bits, its scale and its zero point."""


def second_name(weight: str) -> str:
    """Name of the product of a weight and the second term."""
    return f"{weight}.second"


def rest_of(model: ir.Model, unit: ir.Value, first: Quantised) -> ir.Value:
    """Puts behind an activation what its first term leaves of it; nothing reads the result yet.

    Args:
        model: Graph that the activation is in.
        unit: (..., k) float32, the activation.
        first: Its first term.

    Returns:
        (..., k) float32.
    """
    before = first[0].producer()
    assert before is not None
    back = ir.node("DequantizeLinear", first, name=f"first_of_{unit.name}")
    rest = ir.node("Sub", [unit, back.outputs[0]], name=f"rest_of_{unit.name}")
    for node, name in ((back, f"{unit.name}.first"), (rest, f"{unit.name}.rest")):
        value = node.outputs[0]
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, unit.shape
    model.graph.insert_after(before, [back, rest])
    found: ir.Value = rest.outputs[0]
    return found


def add_second(model: ir.Model, layer: LinearLayer, second: Quantised) -> ir.Value:
    """Adds the product of the second term to what a layer gives.

    Args:
        model: Graph that the layer is in.
        layer: It multiplies the first term by an 8-bit weight already.
        second: The second term.

    Returns:
        The sum, (..., n) float32; what read the product of the first term reads it.
    """
    result, name = layer.node.outputs[0], second_name(layer.weight.name or "")
    entering, weight = layer.node.inputs[0], layer.node.inputs[1]
    assert entering is not None
    back = ir.node("DequantizeLinear", second, name=f"dequantise_for_{name}")
    product = ir.node("MatMul", [back.outputs[0], weight], name=name)
    both = ir.node("Add", [result, product.outputs[0]], name=f"{name}.added")
    for node, label, shape in ((back, f"{name}.input", entering.shape), (product, name, result.shape)):
        value = node.outputs[0]
        value.name, value.dtype, value.shape = label, ir.DataType.FLOAT, shape
    found: ir.Value = both.outputs[0]
    found.name, found.dtype, found.shape = f"{name}.sum", ir.DataType.FLOAT, result.shape
    model.graph.insert_after(layer.node, [back, product, both])
    read_instead(model, result, found)
    return found
