"""Lets an image graph take crops of 8 bits: what the processor does to their values becomes a part of the graph.

Normalising, ``(x * rescale - mean) / std``, is linear per channel, and so is a convolution. A patch convolution without
padding therefore takes it up: its weight is multiplied per channel, and the sum of weight and shift is added to its bias.
Both are nodes that read constants only, so the weight stays in the graph as it is, under its name, where the edit and
the audit look for it; a compiler computes them ahead of time. Padding adds zeros, which mean black before the
normalisation and the mean colour after it: where a stem pads, or is no convolution, the pixels are normalised by nodes.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import onnx_ir as ir

from uwm_deploy.errors import ContractError
from uwm_deploy.records.graph import Normalisation

_PREFIX = "pixels."
"""Names of all that is added begin with it."""

_SPATIAL = (1, 2, 3)
"""Axes of a kernel (out, in, h, w) that are summed over."""


def take_crops(model: ir.Model, by: Normalisation, weights: Set[str]) -> None:
    """Changes the input of an image graph from (batch, 3, H, W) float32 to (batch, H, W, 3) uint8, in place.

    Args:
        model: Float32 graph whose first input is normalised pixels.
        by: How they were normalised.
        weights: Names of the model's weights.

    Raises:
        ContractError: If the input is no batch of images.
    """
    given = model.graph.inputs[0]
    sizes = list(given.shape or ())
    if given.dtype != ir.DataType.FLOAT or len(sizes) != 4 or sizes[1] != 3:
        raise ContractError(f"{given.name} is no batch of images with three channels", fix="export with float32 pixels")
    readers = [(node, place) for node, place in given.uses() if not _reads_batch_only(node)]
    added = _Added(model)
    given.dtype, given.shape = ir.DataType.UINT8, ir.Shape([sizes[0], sizes[2], sizes[3], 3])
    floats = added.node("Cast", [given], "floats", ir.DataType.FLOAT, given.shape, to=int(ir.DataType.FLOAT))
    channels = ir.Shape([sizes[0], 3, sizes[2], sizes[3]])
    levels = added.node("Transpose", [floats], "levels", ir.DataType.FLOAT, channels, perm=[0, 3, 1, 2])
    scale, zero = _scale_and_zero(by)
    if readers and all(_is_plain(node, place) for node, place in readers):
        for node, _ in readers:
            _fold(added, node, levels, added.constant("scale", scale), added.constant("zero", zero), weights)
    else:
        moved = added.node("Add", [levels, added.constant("zero", zero)], "moved", ir.DataType.FLOAT, channels)
        normalised = added.node(
            "Mul", [moved, added.constant("scale", scale)], "normalised", ir.DataType.FLOAT, channels
        )
        for node, place in readers:
            node.replace_input_with(place, normalised)
    added.insert()


def nodes_of_pixels(model: ir.Model) -> set[ir.Node]:
    """What `take_crops` has added; it stays in float32 in every precision."""
    return {node for node in model.graph if (node.name or "").startswith(_PREFIX)}


def _scale_and_zero(by: Normalisation) -> tuple[np.ndarray, np.ndarray]:
    """(1, 3, 1, 1) float32 each: normalised pixels are ``(level + zero) * scale``."""
    mean, std = np.asarray(by.mean, np.float64), np.asarray(by.std, np.float64)
    scale, zero = by.rescale / std, -mean / by.rescale
    return scale.astype(np.float32).reshape(1, 3, 1, 1), zero.astype(np.float32).reshape(1, 3, 1, 1)


def _reads_batch_only(node: ir.Node) -> bool:
    """Whether a node asks for the number of images, which is where it was."""
    start, end = (node.attributes.get_int(name, default) for name, default in (("start", 0), ("end", 4)))
    return bool(node.op_type == "Shape" and (start, end) == (0, 1))


def _is_plain(node: ir.Node, place: int) -> bool:
    """Whether a node is a convolution that takes up the normalisation."""
    if node.op_type != "Conv" or place != 0 or node.attributes.get_int("group", 1) != 1:
        return False
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    pads = node.attributes.get_ints("pads", ())
    kernel, *rest = node.inputs[1:]
    constants = [value is None or value.is_initializer() for value in (kernel, *rest)]
    return kernel is not None and kernel.const_value is not None and all(constants) and not any(pads)


def _fold(added: _Added, node: ir.Node, levels: ir.Value, scale: ir.Value, zero: ir.Value, weights: Set[str]) -> None:
    """Gives a convolution levels instead of normalised pixels, and the weight and bias that make up for it."""
    kernel, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    assert kernel is not None
    assert kernel.shape is not None
    kind, out = ir.DataType.FLOAT, ir.Shape([kernel.shape[0]])
    scaled = added.node("Mul", [kernel, scale], "weight", kind, kernel.shape)
    moved = added.node("Mul", [scaled, zero], "moved", kind, kernel.shape)
    axes = added.constant("axes", np.asarray(_SPATIAL, np.int64))
    offset = added.node("ReduceSum", [moved, axes], "offset", kind, out, keepdims=0)
    if bias is not None and not _is_no_bias(bias, weights):
        offset = added.node("Add", [bias, offset], "bias", kind, out)
    node.replace_input_with(0, levels)
    node.replace_input_with(1, scaled)
    node.resize_inputs(3)
    node.replace_input_with(2, offset)
    if bias is not None and not bias.uses():
        added.forget(bias)


def _is_no_bias(bias: ir.Value, weights: Set[str]) -> bool:
    """Zeros that an exporter puts where the model has no bias."""
    return bias.name not in weights and bias.const_value is not None and not np.any(bias.const_value.numpy())


class _Added:
    """Collects nodes and constants, and puts them in front of a graph."""

    def __init__(self, model: ir.Model) -> None:
        self._graph, self._nodes = model.graph, list[ir.Node]()
        self._constants: dict[str, ir.Value] = {}

    def node(
        self,
        operator: str,
        inputs: list[ir.Value],
        name: str,
        dtype: ir.DataType,
        shape: ir.Shape,
        **attributes: int | list[int],
    ) -> ir.Value:
        """A node with one output; both have its name."""
        found = sum(node.name.split("#")[0] == _PREFIX + name for node in self._nodes if node.name)
        full = f"{_PREFIX}{name}" + (f"#{found + 1}" if found else "")
        node = ir.node(operator, inputs, attributes, name=full)
        value = node.outputs[0]
        value.name, value.dtype, value.shape = full, dtype, shape
        self._nodes.append(node)
        return value

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant of a name, once."""
        full = f"{_PREFIX}{name}"
        if full not in self._constants:
            value = ir.Value(name=full, const_value=ir.tensor(array, name=full))
            value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
            self._graph.register_initializer(value)
            self._constants[full] = value
        return self._constants[full]

    def forget(self, value: ir.Value) -> None:
        """Removes a constant that nothing reads any more."""
        del self._graph.initializers[value.name or ""]

    def insert(self) -> None:
        """Puts the nodes in front of the others."""
        self._graph.insert_before(self._graph[0], self._nodes)
