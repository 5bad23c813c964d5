"""The precision that the parts of a graph really have, read from the graph and not from the settings it was made with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import onnx_ir as ir

from uwm_deploy.graphs.layers import LINEAR

_NAMES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}
_CLASSES = {"Conv": "convolution", "LayerNormalization": "layer norm", "Softmax": "softmax", "Attention": "attention"}


def achieved_precision(model: ir.Model) -> dict[str, dict[str, int]]:
    """Number of nodes by class of operator (convolution, linear, attention, layer norm, softmax) and precision.

    A linear layer is 8-bit when both of its factors come from a DequantizeLinear, and w8a16 when only the weight does. One
    that multiplies two terms of its activation (`graphs.two_terms`) counts once, as `int8-two-terms`.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for node in model.graph:
        if node.op_type in LINEAR:
            kind = "linear" if _has_weight(node) else "attention"
            if not _is_second(node):
                counts[kind][_linear_precision(node) + ("-two-terms" if _has_second(node) else "")] += 1
        elif node.op_type in _CLASSES:
            counts[_CLASSES[node.op_type]][_name(node.outputs[0])] += 1
    return {kind: dict(sorted(found.items())) for kind, found in sorted(counts.items())}


def low_share(achieved: Mapping[str, Mapping[str, int]], precision: str) -> float:
    """Share of the linear layers that have a precision, with one term or two."""
    linear = achieved.get("linear", {})
    found = linear.get(precision, 0) + linear.get(f"{precision}-two-terms", 0)
    return found / total if (total := sum(linear.values())) else 0.0


def _is_second(node: ir.Node) -> bool:
    """Whether it is the product of a second term, which is added to that of the first one."""
    weight, added = node.inputs[1], [user for user, _ in node.outputs[0].uses() if user.op_type == "Add"]
    if weight is None or len(added) != 1 or added[0].inputs[1] is not node.outputs[0]:
        return False
    first = added[0].inputs[0].producer() if added[0].inputs[0] is not None else None
    return first is not None and first.op_type in LINEAR and first.inputs[1] is weight


def _has_second(node: ir.Node) -> bool:
    added = [user for user, _ in node.outputs[0].uses() if user.op_type == "Add"]
    other = added[0].inputs[1] if len(added) == 1 else None
    second = other.producer() if other is not None else None
    return second is not None and second is not node and second.op_type in LINEAR and _is_second(second)


def _producer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    return value.producer() if value is not None else None


def _has_weight(node: ir.Node) -> bool:
    """Whether the second factor is a weight, perhaps behind nodes that transpose, cast or dequantise it."""
    value = node.inputs[1]
    while value is not None and not value.is_initializer():
        before = value.producer()
        if before is None or before.op_type not in ("Transpose", "DequantizeLinear", "Cast"):
            return False
        value = before.inputs[0]
    return value is not None


def _linear_precision(node: ir.Node) -> str:
    sources = [_producer(node, index) for index in (0, 1)]
    if all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
        source = sources[1]
        assert source is not None
        assert source.inputs[0] is not None
        return _name(source.inputs[0])
    if sources[1] is not None and sources[1].op_type == "DequantizeLinear":
        return "w8a16"
    return _name(node.outputs[0])


def _name(value: ir.Value) -> str:
    return _NAMES.get(value.dtype, str(value.dtype)) if value.dtype is not None else "unknown"
