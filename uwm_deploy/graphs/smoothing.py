"""Scales and moves the channels of an activation before it is rounded, and undoes it in the layers that read it.

One scale for a whole activation gives a small channel few steps. Here every channel gets a factor and a shift of its own:
u = x * factor + shift. The layers read u, with their columns divided by the factor and their bias corrected, so in float32
the graph computes what it did. Factors are positive: no entry of a weight changes its sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.layers import LinearLayer, linear_layers
from uwm_deploy.graphs.rounding import is_rounded
from uwm_deploy.graphs.token_scales import size_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """How the channels of one activation are changed: u = x * factor + shift.

    Attributes:
        factor: (k,) float32, positive.
        shift: (k,) float32; None where the layers have no bias that could make up for it.
    """

    factor: np.ndarray
    shift: np.ndarray | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What was chosen for a graph on calibration inputs.

    Attributes:
        channels: By the name of an activation.
        codes: Layer to its weight in 8 bits, (out, in) int8.
        per_token: Activations with a scale per row (`graphs.token_scales`); the others have one for all rows.
        two_terms: Layers that multiply two terms of their activation (`graphs.two_terms`).
    """

    channels: Mapping[str, Channels] = field(default_factory=dict)
    codes: Mapping[str, np.ndarray] = field(default_factory=dict)
    per_token: frozenset[str] = frozenset()
    two_terms: frozenset[str] = frozenset()


def spread_name(name: str) -> str:
    """Name of an activation after its channels were changed."""
    return f"{name}.spread"


def spread(model: ir.Model, value: ir.Value, channels: Channels) -> ir.Value:
    """Puts the change of the channels behind a value; nothing reads the new value yet."""
    before = value.producer()
    names = {"Mul": ("factor", channels.factor), "Add": ("shift", channels.shift)}
    source = value
    for operator, (name, array) in names.items():
        if array is None:
            continue
        tensor = ir.tensor(np.asarray(array, np.float32), name=f"{source.name}.{name}")
        other = ir.Value(
            name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        model.graph.register_initializer(other)
        node = ir.node(operator, [value, other], name=f"{name}_{source.name}")
        node.outputs[0].dtype, node.outputs[0].shape = value.dtype, value.shape
        node.outputs[0].name = f"{source.name}.{name}ed"
        if before is None:
            model.graph.insert_before(model.graph[0], node)
        else:
            model.graph.insert_after(before, node)
        value, before = node.outputs[0], node
    value.name = spread_name(source.name or "")
    return value


def spread_weight(weight: np.ndarray, channels: Channels) -> np.ndarray:
    """A weight that reads changed channels.

    Args:
        weight: (out, in) float32.
        channels: Of what it reads.

    Returns:
        (out, in) float32.
    """
    found: np.ndarray = (weight / channels.factor).astype(np.float32)
    return found


def bias_of(layer: LinearLayer) -> ir.Value | None:
    """The bias that is added to the result of a layer, where nothing else reads either."""
    uses = list(layer.node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or layer.node.outputs[0].is_graph_output():
        return None
    others = [value for value in uses[0].node.inputs if value is not layer.node.outputs[0]]
    bias = others[0] if others else None
    if bias is None or not bias.is_initializer() or bias.const_value is None or len(list(bias.uses())) != 1:
        return None
    out = layer.weight.const_value.shape[0 if layer.transposed else 1] if layer.weight.const_value else 0
    return bias if list(bias.const_value.shape) == [out] else None


def correct_bias(layer: LinearLayer, channels: Channels) -> None:
    """Makes up for the shift of what a layer reads.

    Raises:
        ContractError: If it has no bias of its own.
    """
    if channels.shift is None:
        return
    bias = bias_of(layer)
    if bias is None or bias.const_value is None:
        raise ContractError(f"{layer.name} has no bias of its own", fix="choose for this graph")
    moved = stored_as_rows(layer).astype(np.float64) / channels.factor @ channels.shift.astype(np.float64)
    array = (bias.const_value.numpy().astype(np.float64) - moved).astype(np.float32)
    bias.const_value = ir.tensor(array, name=bias.name)


def stored_as_rows(layer: LinearLayer) -> np.ndarray:
    """The weight of a layer with one row per output, (out, in), any dtype."""
    assert layer.weight.const_value is not None
    array: np.ndarray = layer.weight.const_value.numpy()
    return array if layer.transposed else array.T


def chosen_in(lowered: ir.Model, source: ir.Model) -> Chosen:
    """What a graph in 8 bits was made with, read back from its own constants; second terms stand in its record.

    Args:
        lowered: The graph in 8 bits.
        source: The float32 graph it was made from.

    Raises:
        ContractError: If a weight is not the rounded one of the float32 graph.
    """
    held = lowered.graph.initializers
    channels: dict[str, Channels] = {}
    codes: dict[str, np.ndarray] = {}
    made = {value.name for node in lowered.graph for value in node.outputs}
    for name, layer in linear_layers(source).items():
        entering = layer.node.inputs[0]
        activation = (entering.name or "") if entering is not None else ""
        stored = held.get(layer.weight.name or "")
        factor, shift = (held.get(f"{activation}.{part}") for part in ("factor", "shift"))
        if factor is None or factor.const_value is None or stored is None or stored.const_value is None:
            continue
        if stored.const_value.dtype != ir.DataType.INT8:
            continue
        moved = shift.const_value.numpy() if shift is not None and shift.const_value is not None else None
        channels[activation] = Channels(factor=factor.const_value.numpy(), shift=moved)
        array = stored.const_value.numpy()
        # A weight behind a Transpose is stored as it is multiplied, (in, out).
        rows = array.T if layer.transpose is not None or not layer.transposed else array
        if not _may_be(stored_as_rows(layer), rows, channels[activation]):
            raise ContractError(f"the weight of {name} is not the float32 graph's, rounded", fix="convert again")
        codes[name] = rows
    per_token = frozenset(name for name in channels if size_name(spread_name(name)) in made)
    return Chosen(channels=channels, codes=codes, per_token=per_token)


def _may_be(weight: np.ndarray, codes: np.ndarray, channels: Channels) -> bool:
    if channels.factor.shape != weight.shape[1:] or not (channels.factor > 0).all() or codes.shape != weight.shape:
        return False
    return is_rounded(spread_weight(weight, channels), codes)
