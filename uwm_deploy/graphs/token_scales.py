"""A scale per token: every row of an activation is divided by its largest absolute value before it is rounded.

One scale for all rows gives a row with small values few steps, and cuts off a row with larger ones than calibration inputs
had. The largest value of a row is read from the row itself, so no input is out of range, and no row depends on its batch.
What a layer multiplies is scaled back behind it. All this takes standard operators; every target has them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from uwm_deploy.graphs.layers import read_instead

_SMALLEST = 1e-12
"""A row of zeros is divided by this."""


def size_name(name: str) -> str:
    """Name of the largest absolute value of every row of an activation."""
    return f"{name}.size"


def unit_rows(model: ir.Model, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Puts the division behind a value; nothing reads the results yet.

    Args:
        model: Graph that the value is in.
        value: (..., k) float32, made by a node.

    Returns:
        Rows whose largest absolute value is 1, (..., k) float32, and what they were divided by, (..., 1) float32.
    """
    whole = value.shape
    assert whole is not None
    single = ir.Shape([*list(whole)[:-1], 1])
    axes = _constant(model, f"{value.name}.axes", np.array([-1], np.int64))
    smallest = _constant(model, f"{value.name}.smallest", np.asarray(_SMALLEST, np.float32))
    absolute = _after(model, value, "Abs", [value], f"{value.name}.absolute", whole)
    largest = _after(model, absolute, "ReduceMax", [absolute, axes], f"{value.name}.largest", single)
    size = _after(model, largest, "Max", [largest, smallest], size_name(value.name or ""), single)
    return _after(model, size, "Div", [value, size], f"{value.name}.unit", whole), size


def scale_back(model: ir.Model, result: ir.Value, size: ir.Value) -> None:
    """Multiplies what a layer gives by the sizes of its rows, before its bias is added.

    Args:
        model: Graph that the layer is in.
        result: (..., n) float32, of rows of size 1.
        size: (..., 1) float32, what its rows were divided by.
    """
    assert result.shape is not None
    whole = _after(model, result, "Mul", [result, size], f"{result.name}.sized", result.shape)
    read_instead(model, result, whole)


def _after(
    model: ir.Model, before: ir.Value, operator: str, inputs: list[ir.Value], name: str, shape: ir.Shape
) -> ir.Value:
    node = ir.node(operator, inputs, {"keepdims": 1} if operator == "ReduceMax" else {}, name=name)
    found: ir.Value = node.outputs[0]
    found.name, found.dtype, found.shape = name, ir.DataType.FLOAT, shape
    made_by = before.producer()
    assert made_by is not None
    model.graph.insert_after(made_by, node)
    return found


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
