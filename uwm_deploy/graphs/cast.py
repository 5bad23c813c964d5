"""A float32 graph in half precision: weights and operators are cast; inputs, outputs and chosen nodes stay float32.

The exported graph is converted, and no cast model exported a second time: so any node can stay float32, and every weight
keeps its name.
"""

from __future__ import annotations

from collections.abc import Set

import ml_dtypes
import numpy as np
import onnx_ir as ir

from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.layers import after_the_last_layer
from uwm_deploy.graphs.pixels import nodes_of_pixels

FLOAT16, BFLOAT16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
_NUMPY = {FLOAT16: np.dtype(np.float16), BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
_LARGEST = {FLOAT16: 65504.0, BFLOAT16: 3.3895313892515355e38}
_MASK = 1e30
"""Masks are at least this large, or infinite; no weight is."""

_FROM_OPSET = {BFLOAT16: {"Conv": 22}}
"""First opset in which an operator takes a type; in older opsets the operator stays float32."""


def cast_graph(model: ir.Model, kind: ir.DataType, keep: Set[ir.Node]) -> int:
    """Casts a graph in place.

    The normalisation of the embedding, behind the last linear layer, and that of pixels always stay float32.

    Args:
        model: Float32 graph in which the type of every float value is known.
        kind: `FLOAT16` or `BFLOAT16`.
        keep: Nodes that stay float32.

    Returns:
        Number of constants that were out of range and are now the largest finite number, such as masks of -3.4e38.

    Raises:
        ContractError: If an entry of a weight is out of range: unlike a mask, a clipped weight would change the model.
    """
    opset = model.graph.opset_imports.get("", 0)
    since = _FROM_OPSET.get(kind, {})
    high = keep | after_the_last_layer(model) | nodes_of_pixels(model)
    high |= {node for node in model.graph if since.get(node.op_type, 0) > opset}
    return _Cast(model, kind, high).run()


class _Cast:
    def __init__(self, model: ir.Model, kind: ir.DataType, high: Set[ir.Node]) -> None:
        self.graph, self.kind, self.high = model.graph, kind, high
        self.float_values = {
            value
            for value in (*self.graph.inputs, *self.graph.initializers.values(), *self._produced())
            if value.dtype == ir.DataType.FLOAT
        }
        self.low: set[ir.Value] = set()
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.clamped = 0

    def _produced(self) -> list[ir.Value]:
        return [value for node in self.graph for value in node.outputs]

    def run(self) -> int:
        outputs = list(self.graph.outputs)
        for value in list(self.graph.initializers.values()):
            if value in self.float_values and not any(node in self.high for node, _ in value.uses()):
                self._lower_initialiser(value)
        for node in list(self.graph):
            low = node not in self.high
            for index, value in enumerate(node.inputs):
                if value in self.float_values and (value in self.low) != low:
                    node.replace_input_with(index, self._other(value))
            if low:
                self._lower_node(node)
        for index, value in enumerate(outputs):
            if value in self.low:
                self._raise_output(index, value)
        return self.clamped

    def _lower_initialiser(self, value: ir.Value) -> None:
        assert value.const_value is not None
        value.const_value = self._tensor(value.const_value, value.name or "", weight=True)
        value.dtype = self.kind
        self.low.add(value)

    def _tensor(self, tensor: ir.TensorProtocol, name: str, *, weight: bool) -> ir.TensorProtocol:
        array = np.asarray(tensor.numpy(), dtype=np.float32)
        largest = _LARGEST[self.kind]
        outside = int((np.abs(array) > largest).sum())
        lost = int(((np.abs(array) > largest) & (np.abs(array) < _MASK)).sum())
        if lost and weight and array.size > 1:
            raise ContractError(
                f"{lost} values of {name} are outside the range of {self.kind.name}", fix="keep its layer in float32"
            )
        self.clamped += outside
        return ir.tensor(np.clip(array, -largest, largest).astype(_NUMPY[self.kind]), dtype=self.kind, name=name)

    def _lower_node(self, node: ir.Node) -> None:
        for value in node.outputs:
            if value in self.float_values:
                value.dtype = self.kind
                self.low.add(value)
        if not any(value in self.low for value in node.outputs):
            return
        for name in ("value", "value_float", "to"):
            attribute = node.attributes.get(name)
            if attribute is None:
                continue
            if attribute.type == ir.AttributeType.INT:
                node.attributes[name] = ir.AttrInt64(name, int(self.kind))
            elif attribute.type == ir.AttributeType.FLOAT:
                tensor = ir.tensor(np.float32(attribute.as_float()))
                del node.attributes[name]
                node.attributes["value"] = ir.AttrTensor("value", self._tensor(tensor, "", weight=False))
            else:
                node.attributes[name] = ir.AttrTensor(name, self._tensor(attribute.as_tensor(), "", weight=False))

    def _other(self, value: ir.Value) -> ir.Value:
        """The value in the other precision; all its readers share one Cast."""
        to = ir.DataType.FLOAT if value in self.low else self.kind
        if (value, to) not in self.made:
            node = ir.node("Cast", [value], {"to": int(to)})
            cast = node.outputs[0]
            cast.name, cast.dtype, cast.shape = f"{value.name}_{to.name.lower()}", to, value.shape
            node.name = f"cast_{cast.name}"
            before = value.producer()
            if before is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.insert_after(before, node)
            self.made[value, to] = cast
        return self.made[value, to]

    def _raise_output(self, index: int, value: ir.Value) -> None:
        """Outputs stay float32 under their own names."""
        name = value.name or ""
        value.name = f"{name}_{self.kind.name.lower()}"
        outer = self._other(value)
        outer.name = name
        self.graph.outputs[index] = outer
