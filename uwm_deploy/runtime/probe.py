"""Which precisions ONNX Runtime executes on this machine's CPU: asked of it, with a graph of one multiplication each.

The graphs are encoded here, a few fields of protobuf, because the package onnx is not part of the base install.
"""

from __future__ import annotations

import struct

from uwm_deploy.bundle.protobuf import varint
from uwm_deploy.records.graph import Precision

_FLOAT, _INT8, _FLOAT16, _BFLOAT16, _FLOAT8 = (1, 3, 10, 16, 17)
"""Values of onnx.TensorProto.DataType."""

_HALF = {Precision.FP16: _FLOAT16, Precision.BF16: _BFLOAT16}
_EIGHT_BITS = {Precision.INT8: _INT8, Precision.FP8: _FLOAT8, Precision.W8A16: _INT8}
_OPSET = {Precision.BF16: 22}
PROBED = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8, Precision.W8A16)


def reason_not_executed(precision: Precision) -> str:
    """Empty when ONNX Runtime multiplies in a precision on the CPU, else what it says.

    Being executed does not mean being fast, nor computing in that type: docs/how-to/precision.md.
    """
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = ort.InferenceSession(probe_graph(precision), options, providers=["CPUExecutionProvider"])
        found = session.run(None, {"x": np.full((2, 2), 3, np.float32)})[0]
    except Exception as error:  # its errors share no base class
        return " ".join(str(error).split())[:160]
    return "" if np.array_equal(found, np.full((2, 2), 18, np.float32)) else f"3 * 3 + 3 * 3 is {found[0, 0]}"


def probe_graph(precision: Precision) -> bytes:
    """An ONNX file: x times x, float32 (2, 2) outside, in a precision inside."""
    nodes, tensors = b"", b""
    if kind := _HALF.get(precision):
        nodes += _node("Cast", ["x"], "a", to=kind) + _node("MatMul", ["a", "a"], "b") + _node("Cast", ["b"], "y", to=1)
    elif kind := _EIGHT_BITS.get(precision):
        names = ["scale", "zero"]
        nodes += _node("QuantizeLinear", ["x", *names], "a") + _node("DequantizeLinear", ["a", *names], "c")
        first = "x" if precision is Precision.W8A16 else "b"
        nodes += _node("DequantizeLinear", ["a", *names], "b") if first == "b" else b""
        nodes += _node("MatMul", [first, "c"], "y")
        tensors = _tensor("scale", _FLOAT, struct.pack("<f", 1)) + _tensor("zero", kind, b"\0")
    else:
        nodes += _node("MatMul", ["x", "x"], "y")
    graph = nodes + _part(2, b"probe") + tensors + _part(11, _value("x")) + _part(12, _value("y"))
    opset = _number(2, _OPSET.get(precision, 20))
    return _number(1, 10) + _part(7, graph) + _part(8, opset)


def _node(operator: str, inputs: list[str], output: str, **numbers: int) -> bytes:
    body = b"".join(_part(1, name.encode()) for name in inputs) + _part(2, output.encode())
    body += _part(3, f"{operator}_{output}".encode()) + _part(4, operator.encode())
    for name, value in numbers.items():
        body += _part(5, _part(1, name.encode()) + _number(3, value) + _number(20, 2))
    return _part(1, body)


def _tensor(name: str, kind: int, data: bytes) -> bytes:
    return _part(5, _number(2, kind) + _part(8, name.encode()) + _part(9, data))


def _value(name: str) -> bytes:
    side = _part(1, _number(1, 2))
    return _part(1, name.encode()) + _part(2, _part(1, _number(1, _FLOAT) + _part(2, side + side)))


def _number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def _part(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data
