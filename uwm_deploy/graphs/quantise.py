"""Explicit quantisation of linear layers: Q/DQ pairs around the input, a DQ behind an 8-bit weight of the same name.

Quantisation is symmetric, since TensorRT takes no other: INT8 has a scale per output channel of a weight and one per
activation, FP8 (E4M3) one scale per tensor. Scales of weights come from absolute values, so negating entries does not change
them. What was chosen on calibration inputs (`graphs.smoothing`) goes in here; without it, all is rounded to the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.layers import LinearLayer, linear_layers
from uwm_deploy.graphs.rounding import paired_scale
from uwm_deploy.graphs.smoothing import Channels, Chosen, correct_bias, spread, spread_weight, stored_as_rows
from uwm_deploy.graphs.token_scales import scale_back, unit_rows
from uwm_deploy.graphs.two_terms import Quantised, add_second, rest_of

EightBitType = Literal["int8", "fp8"]
_TYPE = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
_NUMPY = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
LARGEST = {"int8": 127.0, "fp8": 448.0}
NEAREST = Chosen()
"""No activation is changed, and every weight is rounded to the nearest number."""
_SMALLEST_SCALE = 1e-12
"""Scale of a channel of zeros, which would otherwise be 0."""


def input_names(model: ir.Model, layers: Set[str]) -> dict[str, str]:
    """Name of the activation that each of some layers reads, by layer."""
    return {name: _input_of(layer).name or "" for name, layer in linear_layers(model).items() if name in layers}


def quantise_graph(
    model: ir.Model, layers: Set[str], largest: Mapping[str, float], kind: EightBitType, chosen: Chosen = NEAREST
) -> None:
    """Quantises layers in place; all others stay as they are.

    Args:
        model: Float32 graph.
        layers: Names, as `linear_layers` gives them.
        largest: Activation by name to its largest absolute value on calibration inputs.
        kind: 8-bit type.
        chosen: Activations whose channels are changed, and the weights of the layers that read them.

    Raises:
        ContractError: If an activation has no range, or a weight is used by another node as well.
    """
    found = linear_layers(model)
    if unknown := sorted(layers - set(found)):
        raise ContractError(f"the graph has no linear layer {unknown[0]}", fix="quantise the graph this plan is for")
    shared: dict[ir.Value, _Entering] = {}
    for name in [name for name in found if name in layers]:
        layer = found[name]
        entering = _input_of(layer)
        channels = chosen.channels.get(entering.name or "")
        if entering not in shared:
            shared[entering] = _entering(model, entering, channels, largest, kind, chosen)
        if channels:
            correct_bias(layer, channels)
        _quantise_weight(model, layer, kind, channels, chosen.codes.get(name))
        first = shared[entering]
        back = ir.node("DequantizeLinear", first.quantised, name=f"dequantise_for_{layer.node.name}")
        read = back.outputs[0]  # one per layer: ONNX Runtime fuses a multiplication only with its own DQ
        read.name, read.dtype, read.shape = f"{layer.node.name}.input", ir.DataType.FLOAT, entering.shape
        model.graph.insert_before(layer.node, back)
        layer.node.replace_input_with(0, read)
        result = layer.node.outputs[0]
        if name in chosen.two_terms:
            result = add_second(model, layer, _second(model, first))
        if first.size is not None:
            scale_back(model, result, first.size)


@dataclass(slots=True)
class _Entering:
    """An activation in 8 bits.

    Attributes:
        value: What was rounded, (..., k) float32.
        quantised: In 8 bits, with scale and zero point.
        size: What its rows were divided by, (..., 1) float32; None where it has one scale for all rows.
        second: The second term; None where no layer has asked for it.
    """

    value: ir.Value
    quantised: Quantised
    size: ir.Value | None
    second: Quantised | None = None


def _entering(
    model: ir.Model,
    entering: ir.Value,
    channels: Channels | None,
    largest: Mapping[str, float],
    kind: EightBitType,
    chosen: Chosen,
) -> _Entering:
    changed = spread(model, entering, channels) if channels else entering
    bound, size = largest.get(changed.name or "", np.nan), None
    if entering.name in chosen.per_token:
        bound = 1.0
        changed, size = unit_rows(model, changed)
    if not np.isfinite(bound):
        raise ContractError(f"activation {changed.name} has no range", fix="calibrate on this graph")
    return _Entering(changed, _quantised_activation(model, changed, bound, kind), size)


def _second(model: ir.Model, first: _Entering) -> Quantised:
    """The second term of an activation with a scale per token: what is left of it is at most half a step."""
    if first.size is None:
        raise ContractError(f"activation {first.value.name} has no scale per token", fix="choose for this graph")
    if first.second is None:
        rest = rest_of(model, first.value, first.quantised)
        first.second = _quantised_activation(model, rest, 1 / (2 * LARGEST["int8"]), "int8")
    return first.second


def quantise_weights(model: ir.Model, layers: Set[str]) -> None:
    """Stores the weights of layers in 8 bits, rounded to the nearest, in place; activations stay as they are.

    Args:
        model: Float32 graph.
        layers: Names, as `linear_layers` gives them.

    Raises:
        ContractError: If a weight is used by another node as well.
    """
    for name, layer in linear_layers(model).items():
        if name in layers:
            _quantise_weight(model, layer, "int8", None, None)


def _input_of(layer: LinearLayer) -> ir.Value:
    value = layer.node.inputs[0]
    assert value is not None
    return value


def _quantised_activation(model: ir.Model, value: ir.Value, bound: float, kind: EightBitType) -> Quantised:
    """Puts a Q behind a value, and gives the quantised value, its scale and its zero point."""
    scale = _initialiser(
        model, f"{value.name}.scale", np.asarray(max(bound / LARGEST[kind], _SMALLEST_SCALE), np.float32)
    )
    zero = _initialiser(model, f"{value.name}.zero_point", np.zeros((), _NUMPY[kind]), _TYPE[kind])
    quantise = ir.node("QuantizeLinear", [value, scale, zero], name=f"quantise_{value.name}")
    quantised = quantise.outputs[0]
    quantised.name, quantised.dtype, quantised.shape = f"{value.name}.quantised", _TYPE[kind], value.shape
    before = value.producer()
    if before is None:
        model.graph.insert_before(model.graph[0], quantise)
    else:
        model.graph.insert_after(before, quantise)
    return quantised, scale, zero


def _quantise_weight(
    model: ir.Model, layer: LinearLayer, kind: EightBitType, channels: Channels | None, codes: np.ndarray | None
) -> None:
    """8-bit weight in the orientation of the multiplication, under its own name, and a DQ behind it."""
    users = {node for node, _ in layer.weight.uses()}
    if len(users) > 1:
        raise ContractError(f"weight {layer.weight.name} is used by {len(users)} nodes", fix="leave its layer out")
    weight = stored_as_rows(layer).astype(np.float32)  # (out, in)
    axis = 0 if layer.node.op_type == "Gemm" and layer.node.attributes.get_int("transB", 0) == 1 else 1
    if channels is not None and codes is not None:
        scale, rounded = paired_scale(spread_weight(weight, channels)), codes
    else:
        scale = weight_scale(weight, 0, kind)
        rounded = rounded_weight(weight, scale, 0, kind)
    rounded = np.ascontiguousarray(rounded if axis == 0 else rounded.T)
    value = layer.weight
    value.const_value = ir.tensor(rounded, dtype=_TYPE[kind], name=value.name)
    value.dtype, value.shape = _TYPE[kind], ir.Shape(rounded.shape)
    scale_value = _initialiser(model, f"{value.name}.scale", scale)
    zero = _initialiser(model, f"{value.name}.zero_point", np.zeros(scale.shape, _NUMPY[kind]), _TYPE[kind])
    attributes = {"axis": axis} if scale.ndim else {}
    node = ir.node("DequantizeLinear", [value, scale_value, zero], attributes, name=f"dequantise_{value.name}")
    output = node.outputs[0]
    output.name, output.dtype, output.shape = f"{value.name}.dequantised", ir.DataType.FLOAT, value.shape
    model.graph.insert_before(layer.node, node)
    layer.node.replace_input_with(1, output)
    if layer.transpose is not None:
        model.graph.remove(layer.transpose, safe=True)


def weight_scale(weight: np.ndarray, axis: int, kind: EightBitType) -> np.ndarray:
    """Scales of a weight: the largest absolute value becomes the largest 8-bit number.

    Args:
        weight: (rows, columns) float32.
        axis: Axis of the output channels.
        kind: 8-bit type.

    Returns:
        For INT8 (rows,) or (columns,) float32, one scale per output channel; for FP8 () float32.
    """
    largest = np.abs(weight).max(axis=1 - axis) if kind == "int8" else np.abs(weight).max()
    scale: np.ndarray = np.maximum(
        np.asarray(largest, np.float32) / np.float32(LARGEST[kind]), np.float32(_SMALLEST_SCALE)
    )
    return scale


def rounded_weight(weight: np.ndarray, scale: np.ndarray, axis: int, kind: EightBitType) -> np.ndarray:
    """A weight in 8 bits.

    Args:
        weight: (rows, columns) float32.
        scale: (rows,), (columns,) or () float32, see `weight_scale`.
        axis: Axis of the output channels.
        kind: 8-bit type.

    Returns:
        (rows, columns), int8 or the dtype float8_e4m3fn.
    """
    along = np.expand_dims(scale, 1 - axis) if scale.ndim else scale
    scaled = np.clip(weight / along, -LARGEST[kind], LARGEST[kind])
    rounded: np.ndarray = (np.rint(scaled) if kind == "int8" else scaled).astype(_NUMPY[kind])
    return rounded


def _initialiser(model: ir.Model, name: str, array: np.ndarray, kind: ir.DataType | None = None) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), dtype=kind, name=name)
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
