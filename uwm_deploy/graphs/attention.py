"""Puts one `Attention` node in the place of an attention's steps; the operator is standard from opset 23 on.

The exported graph has the steps, which every target and every opset knows. What a graph becomes for one target is decided
where it is compiled (`graphs.attention_choice`). Weights keep their names and values: only operators without weights are
replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from uwm_deploy.graphs.builder_log import BuildFailed
from uwm_deploy.graphs.tensor_layout import mapped_weights
from uwm_deploy.records.graph import FUSED, STEPS, EngineArtifact

OPSET = 23
"""First opset with the operator."""

_IR_VERSION = 11
"""First version of the format that may hold this opset."""

_HEADS_FIRST, _KEYS_LAST = [0, 2, 1, 3], [0, 2, 3, 1]
"""Permutations of (batch, tokens, heads, channels)."""


@dataclass(frozen=True, slots=True)
class Fused:
    """What became of the attentions of a graph.

    Attributes:
        nodes: Attentions that are one node now.
        one_row: Attentions with one query row, which stay in steps.
    """

    nodes: int
    one_row: int

    def __str__(self) -> str:
        """For the record of an engine."""
        kept = f", {self.one_row} of one query row in steps" if self.one_row else ""
        return f"{FUSED}, {self.nodes} nodes{kept}"


@dataclass(frozen=True, slots=True)
class _Steps:
    """One attention in steps: its inputs, (batch, tokens, channels) each, and the node that gives its result."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    heads: int
    scale: float
    last: ir.Node


def fuse_attention(model: ir.Model) -> Fused:
    """Replaces the steps of every attention by one node, in place.

    Attention with one query row, as in SigLIP's pooling head, stays in steps: some releases of TensorRT compute the node
    wrong there (docs/how-to/compile.md), and there is nothing to gain from one row.

    Args:
        model: Graph of a tower, in any precision and at any opset; weights may lie elsewhere.
    """
    found = [steps for node in model.graph if node.op_type == "Softmax" and (steps := _steps_of(node)) is not None]
    several = [steps for steps in found if _tokens(steps.query) != 1]
    for steps in several:
        _put(model.graph, steps)
    if several:
        common.RemoveUnusedNodesPass()(model)
        model.graph.opset_imports[""] = max(OPSET, model.graph.opset_imports[""])
        model.ir_version = max(_IR_VERSION, model.ir_version)
    return Fused(nodes=len(several), one_row=len(found) - len(several))


def fused_frame(graph: bytes, name: str) -> tuple[onnx.ModelProto, Fused]:
    """The same for the message of a graph without its weights, see `tensor_layout.mapped_weights`.

    Args:
        graph: The message.
        name: Of its file, for messages.

    Raises:
        BuildFailed: If there is no attention that can be one node.
    """
    model = ir.from_proto(onnx.ModelProto.FromString(graph))
    if not (fused := fuse_attention(model)).nodes:
        raise BuildFailed(f"{name} has no attention that can be one node")
    return ir.to_proto(model), fused


def fused_file(path: Path) -> tuple[onnx.ModelProto, Fused]:
    """The same for a file. Its weights are read once, and not copied; external data stays where it is.

    Raises:
        BuildFailed: If there is no attention that can be one node.
    """
    frame, fused = fused_frame(mapped_weights(path)[0], path.name)
    model = onnx.load(path, load_external_data=False)
    read = {tensor.name for tensor in frame.graph.initializer}
    for at in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[at].name not in read:
            del model.graph.initializer[at]
    for part in ("node", "value_info"):
        model.graph.ClearField(part)
        getattr(model.graph, part).extend(getattr(frame.graph, part))
    model.ClearField("opset_import")
    model.opset_import.extend(frame.opset_import)
    model.ir_version = frame.ir_version
    return model, fused


def is_fused(engine: EngineArtifact) -> bool:
    """Whether an engine was made with one node for each attention."""
    return engine.settings.get("attention", STEPS).startswith(FUSED)


def _put(graph: ir.Graph, steps: _Steps) -> None:
    result, mask = steps.last.outputs[0], [steps.mask] if steps.mask is not None else []
    node = ir.node(
        "Attention",
        [steps.query, steps.key, steps.value, *mask],
        {"q_num_heads": steps.heads, "kv_num_heads": steps.heads, "scale": steps.scale},
        name=f"node_{result.name}.attention",
    )
    graph.insert_before(steps.last, node)
    fused, name = node.outputs[0], result.name
    fused.dtype, fused.shape = result.dtype, result.shape
    result.replace_all_uses_with(fused)
    result.name, fused.name = f"{name}.steps", name


def _steps_of(softmax: ir.Node) -> _Steps | None:
    """The attention that a softmax belongs to; None where it is another kind of computation."""
    logits = softmax.inputs[0]
    if logits is None or logits.shape is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    mask = None
    if (added := _maker(logits, "Add")) is not None:
        logits, mask = added.inputs
    logits, scale = _unscaled(logits)
    product = _maker(logits, "MatMul")
    mixing = _reader(_uncast(softmax.outputs[0]), "MatMul")
    if product is None or mixing is None or _maker(mixing.inputs[0], "Softmax", "Cast") is None:
        return None
    queries, query_scale = _unscaled(product.inputs[0])
    query, key = _source(queries, _HEADS_FIRST), _source(product.inputs[1], _KEYS_LAST)
    value, last = _source(mixing.inputs[1], _HEADS_FIRST), _last(mixing)
    if query is None or key is None or value is None or last is None or queries is None or queries.shape is None:
        return None
    heads = queries.shape[1]
    if not isinstance(heads, int) or not _may_mask(mask, query):
        return None
    return _Steps(query, key, value, mask, heads, scale * query_scale, last)


def _source(heads: ir.Value | None, order: list[int]) -> ir.Value | None:
    """The (batch, tokens, channels) that were split into heads."""
    turned = _maker(heads, "Transpose")
    split = _maker(turned.inputs[0], "Reshape") if turned is not None else None
    if turned is None or split is None or list(turned.attributes.get_ints("perm", ())) != order:
        return None
    source = split.inputs[0]
    return source if source is not None and source.shape is not None and len(source.shape) == 3 else None


def _last(mixing: ir.Node) -> ir.Node | None:
    """The node that puts the heads beside each other again."""
    turned = _reader(mixing.outputs[0], "Transpose")
    if turned is None or list(turned.attributes.get_ints("perm", ())) != _HEADS_FIRST:
        return None
    joined = _reader(turned.outputs[0], "Reshape")
    if joined is None or joined.outputs[0].is_graph_output():
        return None
    shape = joined.outputs[0].shape
    return joined if shape is not None and len(shape) == 3 else None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value before it was multiplied or divided by a number, and the factor."""
    node = _maker(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    before, by = node.inputs
    tensor = ir.convenience.get_const_tensor(by) if by is not None else None
    if tensor is None or tensor.size != 1:
        return value, 1.0
    number = float(tensor.numpy().reshape(()))
    return before, number if node.op_type == "Mul" else 1 / number


def _uncast(value: ir.Value) -> ir.Value:
    """What a cast to the type that it has already gives."""
    node = _reader(value, "Cast")
    return node.outputs[0] if node is not None and node.outputs[0].dtype == value.dtype else value


def _maker(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in kinds else None


def _reader(value: ir.Value, kind: str) -> ir.Node | None:
    """The one node that reads a value."""
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == kind and not value.is_graph_output() else None


def _may_mask(mask: ir.Value | None, query: ir.Value) -> bool:
    """Whether the operator takes what is added to the logits: numbers of its own type, of 2 to 4 dimensions."""
    return mask is None or (mask.dtype == query.dtype and mask.shape is not None and 2 <= len(mask.shape) <= 4)


def _tokens(value: ir.Value) -> object:
    return value.shape[1] if value.shape is not None else None
