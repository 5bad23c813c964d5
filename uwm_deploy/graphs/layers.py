"""Parts of a graph that a precision plan can name: linear layers by their weight, other nodes by name or operator."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from uwm_deploy.errors import InputError
from uwm_deploy.records.edit import MAP_NAMES

LINEAR = ("MatMul", "Gemm")
_NAMED = 3
"""Layers that a message names."""


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A multiplication by a weight.

    Attributes:
        name: Module path in the source model: the weight's name without its last part.
        node: The multiplication.
        weight: The initialiser.
        transpose: Node between the weight and the multiplication; None when there is none.
        transposed: Whether the weight is stored as (out, in).
    """

    name: str
    node: ir.Node
    weight: ir.Value
    transpose: ir.Node | None
    transposed: bool


def linear_layers(model: ir.Model) -> dict[str, LinearLayer]:
    """Linear layers by name, in the order in which they run; further uses of one weight are named ``#2``, ``#3``."""
    found: dict[str, LinearLayer] = {}
    for node in model.graph:
        if node.op_type not in LINEAR or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        weight, transpose = node.inputs[1], None
        before = weight.producer()
        if before is not None and before.op_type == "Transpose" and before.inputs[0] is not None:
            weight, transpose = before.inputs[0], before
        if not weight.is_initializer() or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        name = (weight.name or "").rpartition(".")[0] or (weight.name or "")
        again = sum(layer.weight is weight for layer in found.values())
        by_gemm = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
        found[f"{name}#{again + 1}" if again else name] = LinearLayer(
            name, node, weight, transpose, transposed=(transpose is not None) != by_gemm
        )
    return found


def matching_nodes(model: ir.Model, patterns: Sequence[str]) -> set[ir.Node]:
    """Nodes that a plan's patterns name: globs over layer names, node names and operator types.

    A multiplication brings the Transpose of its weight along, which would round the weight otherwise. A layer's name also
    matches the node that adds its bias.

    Raises:
        InputError: If a pattern matches nothing.
    """
    names: list[tuple[str, ir.Node]] = [(layer, part.node) for layer, part in linear_layers(model).items()]
    names += [(text, node) for node in model.graph for text in (node.name or "", node.op_type)]
    names += [(value.name.rpartition(".")[0], node) for node in model.graph for value in _weights(node) if value.name]
    chosen: set[ir.Node] = set()
    for pattern in patterns:
        matches = {node for text, node in names if text and fnmatch.fnmatchcase(text, pattern)}
        if not matches:
            raise InputError(
                f"pattern {pattern!r} matches no layer, node or operator of the graph",
                fix=_hint(pattern, list(linear_layers(model))),
            )
        chosen |= matches
    turns = {
        part.transpose for part in linear_layers(model).values() if part.node in chosen and part.transpose is not None
    }
    return chosen | turns


def _hint(pattern: str, layers: Sequence[str]) -> str:
    """Some layers of a graph: those that a pattern may have meant, else the first ones."""
    bare = pattern.strip("*.")
    parts = bare.count(".") + 1
    # A pattern is often the end of a name: as many parts of a name are compared, and the first layer stands for all.
    ends = {".".join(name.split(".")[-parts:]): name for name in reversed(layers)}
    if near := difflib.get_close_matches(bare, ends, n=_NAMED, cutoff=0.6):
        return f"near to it are the layers {', '.join(ends[end] for end in near)}"
    some = f"{', '.join(layers[:_NAMED])}{', ...' if len(layers) > _NAMED else ''}"
    return f"its {len(layers)} linear layers are {some}" if layers else "the graph has no linear layer to name"


def _weights(node: ir.Node) -> Iterable[ir.Value]:
    return (value for value in node.inputs if value is not None and value.is_initializer())


def after_the_last_layer(model: ir.Model) -> set[ir.Node]:
    """Nodes between the last linear layer and the embedding: its normalisation, and a map behind it."""
    maps = set(MAP_NAMES.values())
    linear = {layer.node for name, layer in linear_layers(model).items() if name not in maps}
    waiting = [model.graph.outputs[0].producer()]
    found: set[ir.Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in found or node in linear:
            continue
        found.add(node)
        waiting += [value.producer() for value in node.inputs if value is not None]
    return found


def read_instead(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Lets all that reads one value read another, which is made of it; an output of the graph keeps its name.

    Args:
        model: Graph that both are in.
        old: What is read now, any shape and dtype; the node that makes `new` goes on reading it.
        new: What is read then, of the same shape and dtype.
    """
    for node, place in [(use.node, use.idx) for use in old.uses() if use.node is not new.producer()]:
        node.replace_input_with(place, new)
    if old.is_graph_output():
        outputs = model.graph.outputs
        outputs[outputs.index(old)] = new
        new.name, old.name = old.name, new.name
