"""Pools before the layers that work on each token alone, and not behind them.

A CLIP tower embeds one token of its last block. Behind its attention that block treats each token by itself, so the results
of the other tokens, 9 of 12 parts of the block's multiplications, are computed and dropped. Neither ONNX Runtime nor
TensorRT optimises this.
"""

from __future__ import annotations

import onnx_ir as ir

_ALONE = frozenset(
    (
        "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Sigmoid", "Tanh", "Erf", "Gelu", "Relu", "Identity", "Cast",
        "LayerNormalization", "MatMul",
    )
)  # fmt: skip
"""Operators that treat each token alone, if their other inputs have no tokens."""

_HAS_TOKENS = 3
"""Number of dimensions of a value with tokens: batch, tokens, channels."""


def pool_early(model: ir.Model) -> None:
    """Moves the node that picks a token forward to the last node that mixes tokens, in place; unless others are read, too.

    Values in between change from (batch, tokens, channels) to (batch, 1, channels), and keep their names. With (batch,
    channels) ONNX Runtime would make a Gemm of a product of matrices, which it does not compute in 8 bits.
    """
    for node in list(model.graph):
        if _chooses_a_token(node):
            _pull(model.graph, node)


def _chooses_a_token(node: ir.Node) -> bool:
    if node.op_type not in ("Gather", "GatherND") or node.outputs[0].is_graph_output():
        return False
    tokens, chosen = node.inputs
    if tokens is None or chosen is None or chosen.shape is None or _dimensions(tokens) != _HAS_TOKENS:
        return False
    assert tokens.shape is not None
    if tokens.shape[1] == 1:
        return False
    if node.op_type == "Gather":
        return node.attributes.get_int("axis", 0) == 1 and len(chosen.shape) == 0
    return node.attributes.get_int("batch_dims", 0) == 0 and len(chosen.shape) == 2 and chosen.shape[1] == 2


def _pull(graph: ir.Graph, choice: ir.Node) -> None:
    tokens = choice.inputs[0]
    assert tokens is not None
    moved, wanted, cuts = {choice}, {tokens: None}, []
    for node in reversed(list(graph)):  # readers of a value come before it in this order
        for value in node.outputs:
            if value not in wanted:
                continue
            read = {user for user, _ in value.uses()}
            if read <= moved and not value.is_graph_output() and _works_alone(node, tokens):
                moved.add(node)
                wanted.update((v, None) for v in node.inputs if v is not None and _dimensions(v) == _HAS_TOKENS)
            else:
                cuts.append(value)
    if not any(node.op_type == "MatMul" for node in moved):
        return
    indices, before = _keeping_a_dimension(choice), choice.outputs[0]
    for value in cuts + [value for value in wanted if value.producer() is None]:
        early = ir.Node("", choice.op_type, [value, indices], choice.attributes.values())
        chosen = _inserted(early, choice, f"{before.name}.of.{value.name}", _one_token(value))
        for user, at in list(value.uses()):
            if user in moved and user is not choice:
                user.replace_input_with(at, chosen)
    for node in moved - {choice}:
        node.outputs[0].shape = _one_token(node.outputs[0])
    back = ir.node("Squeeze", [tokens, _axis(1, choice, f"{before.name}.axis")])
    result = _inserted(back, choice, f"{before.name}.pooled", before.shape)
    before.replace_all_uses_with(result)
    graph.remove(choice, safe=True)
    graph.sort()


def _keeping_a_dimension(choice: ir.Node) -> ir.Value:
    """Indices with which the picking node gives (batch, 1, channels)."""
    indices = choice.inputs[1]
    assert indices is not None
    assert indices.shape is not None
    axis = len(indices.shape) - 1 if len(indices.shape) else 0  # (batch, 1, 2) of GatherND, (1,) of Gather
    shape = ir.Shape([*indices.shape[:axis], 1, *indices.shape[axis:]])
    name = f"{choice.outputs[0].name}.index"
    return _inserted(ir.node("Unsqueeze", [indices, _axis(axis, choice, f"{name}.axis")]), choice, name, shape)


def _axis(axis: int, choice: ir.Node, name: str) -> ir.Value:
    """A constant as a node, like the exporter's own: tools that fold constants lose the name of an initialiser."""
    node = ir.node(
        "Constant", [], {"value": ir.tensor([axis], dtype=ir.DataType.INT64, name=name)}, name=f"node_{name}"
    )
    assert choice.graph is not None
    choice.graph.insert_before(choice, node)
    value = node.outputs[0]
    value.name, value.dtype, value.shape = name, ir.DataType.INT64, ir.Shape([1])
    return value


def _inserted(node: ir.Node, choice: ir.Node, name: str, shape: ir.Shape | None) -> ir.Value:
    """Output of a new node, which is inserted; its type is that of the node's first input."""
    assert choice.graph is not None
    choice.graph.insert_before(choice, node)
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    node.name, result.name, result.dtype, result.shape = f"node_{name}", name, source.dtype, shape
    return result


def _works_alone(node: ir.Node, tokens: ir.Value) -> bool:
    """Whether a node treats each token alone, and every input with tokens has all of them."""
    if node.op_type not in _ALONE or len(node.outputs) != 1:
        return False
    if node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) != -1:
        return False
    *values, last = node.inputs
    if node.op_type == "MatMul" and (last is None or _dimensions(last) != 2):
        return False
    others = values if node.op_type == "MatMul" else node.inputs
    return all(value is None or _dimensions(value) in (0, 1) or _same_tokens(value, tokens) for value in others)


def _same_tokens(value: ir.Value, tokens: ir.Value) -> bool:
    if value.shape is None or tokens.shape is None or len(value.shape) != _HAS_TOKENS:
        return False
    unknown = ir.SymbolicDim(None)
    return all(a == b and a != unknown for a, b in zip(value.shape[:2], tokens.shape[:2], strict=True))


def _dimensions(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _one_token(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([value.shape[0], 1, value.shape[2]])
