"""An ONNX graph as text without weight values: one line per value and per node, so that a change shows in a diff."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

_FEW = 16
"""Largest number of elements of a constant that is shown with its values, such as axes and shapes."""


def text_of_graph(model: ir.Model) -> str:
    """Renders a graph; equal graphs give equal texts, whatever their weights.

    Shown are opsets, inputs, outputs, initialisers in order of name, and all nodes in order, with operator, attributes,
    inputs, and outputs with type and shape. Constants of the exporter with few entries are shown with their values.
    """
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(model.opset_imports.items()))
    lines = [f"opset {opsets}; IR version {model.ir_version}", ""]
    lines += _section("input", (_typed(value) for value in model.graph.inputs))
    lines += _section("output", (_typed(value) for value in model.graph.outputs))
    named = sorted(model.graph.initializers.items())
    lines += _section("initialiser", (_initialiser(value) for _, value in named))
    lines += _section("node", _nodes(model.graph))
    for key, function in sorted(model.functions.items()):
        lines += _section(f"function {':'.join(map(str, key))} node", _nodes(function))
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(what: str, parts: Iterable[str]) -> list[str]:
    found = list(parts)
    count = sum(not part.startswith(" ") for part in found)
    return [f"{count} {what}{'' if count == 1 else 's'}", *(f"  {part}" for part in found), ""]


def _nodes(graph: Iterable[ir.Node]) -> Iterator[str]:
    """A line per node; the nodes of a subgraph follow their node, indented."""
    for node in graph:
        yield _node(node)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from (f"  {attribute.name}: {line}" for line in _nodes(attribute.as_graph()))


def _node(node: ir.Node) -> str:
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = ", ".join(f"{name}={_attribute(one)}" for name, one in sorted(node.attributes.items()))
    inputs = ", ".join("-" if value is None else value.name or "?" for value in node.inputs)
    outputs = ", ".join(_typed(value) for value in node.outputs)
    return f"{node.name}: {operator}{f'[{attributes}]' if attributes else ''}({inputs}) -> {outputs}"


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{_type(tensor.dtype)} {_shape(tensor.shape)}{_values(tensor)}"
    if attribute.type == ir.AttributeType.GRAPH:
        return "graph"
    value = attribute.value
    if attribute.type == ir.AttributeType.FLOAT:
        return f"{value:.7g}"
    if isinstance(value, tuple | list):
        return f"({', '.join(f'{one:.7g}' if isinstance(one, float) else str(one) for one in value)})"
    return str(value)


def _initialiser(value: ir.Value) -> str:
    """An initialiser; one whose name has a dot is a weight or belongs to one, so its values are not shown."""
    tensor = value.const_value
    constant = tensor is not None and "." not in (value.name or ".")
    return _typed(value) + (_values(tensor) if constant and tensor is not None else "")


def _values(tensor: ir.TensorProtocol) -> str:
    if tensor.size > _FEW:
        return ""
    entries = np.asarray(tensor.numpy()).reshape(-1).tolist()
    return " = " + " ".join(f"{entry:.7g}" if isinstance(entry, float) else str(entry) for entry in entries)


def _typed(value: ir.Value) -> str:
    return f"{value.name} {_type(value.dtype)} {_shape(value.shape)}"


def _type(kind: ir.DataType | None) -> str:
    """Name of a type as in numpy; ONNX calls float32 "float"."""
    if kind is None:
        return "?"
    name: str = kind.name.lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _shape(shape: Iterable[object] | None) -> str:
    if shape is None:
        return "(?)"
    sizes = [str(size.value or "?") if isinstance(size, ir.SymbolicDim) else str(size) for size in shape]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"
