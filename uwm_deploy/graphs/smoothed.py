"""The float32 graph that an INT8 graph was rounded from, with the factors, shifts and row sizes that stand in that one.

A calibrated INT8 graph changes the channels of an activation on purpose and undoes it in the layers that read it
(`graphs.smoothing`, `graphs.token_scales`). Its numbers there are comparable only with a reference that does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from uwm_deploy.graphs.layers import LinearLayer, linear_layers
from uwm_deploy.graphs.norm_folding import fold_into_norms
from uwm_deploy.graphs.smoothing import (
    Channels,
    bias_of,
    correct_bias,
    spread,
    spread_name,
    spread_weight,
    stored_as_rows,
)
from uwm_deploy.graphs.token_scales import scale_back, size_name, unit_rows
from uwm_deploy.graphs.two_terms import second_name
from uwm_deploy.graphs.walk import Graph

_NORMS = {"LayerNormalization": (1, 2), "SkipLayerNormalization": (2, 3)}
"""Where a normalisation has its weight and its bias among its inputs."""

_DIGITS = 1e-6
"""A difference of two float32 numbers that is smaller than this share of them is rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothed:
    """A reference whose values have the names and the sizes of the values of an artifact.

    Attributes:
        graph: Computes what the exported graph computes, in float32.
        together: Weights that the artifact rounds up or down, and not to the nearest number.
        about: Tensors worked out from numbers that were rounded to float32 after they had been folded.
    """

    graph: Graph
    together: frozenset[str] = frozenset()
    about: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Found:
    channels: Channels
    folded: bool
    exact: bool


def smoothed_as(reference: Graph, artifact: Graph, made_from: Path | None) -> Smoothed:
    """Changes the channels of a float32 graph as an artifact does; the same graph where the artifact changes none.

    Args:
        reference: Exported float32 graph; it stays as it is.
        artifact: Graph that was made of it.
        made_from: Graph that the artifact was compiled from, which has factors that compiling folds away; None where the
            artifact is that graph, or it was not kept.
    """
    if not any(name.endswith(spread_name("")) for name in artifact.producer):
        return Smoothed(graph=reference)
    before = Graph(made_from) if made_from is not None else None
    model = ir.serde.deserialize_model(reference.proto)
    readers: dict[ir.Value, list[LinearLayer]] = {}
    for layer in linear_layers(model).values():
        entering, stored = layer.node.inputs[0], artifact.initialisers.get(layer.weight.name or "")
        # A layer that stayed in float32 reads the activation as it was.
        if entering is not None and stored is not None and stored.data_type == onnx.TensorProto.INT8:
            readers.setdefault(entering, []).append(layer)
    together: set[str] = set()
    about: set[str] = set()
    folded = False
    for entering, layers in readers.items():
        found = _found(entering, artifact, before)
        if found is None or any(not _can_follow(layer, found.channels) for layer in layers):
            continue
        changed = _changed(model, entering, layers, found.channels, artifact)
        together.update(layer.weight.name or "" for layer in layers)
        about.update(() if found.exact else changed)
        folded = folded or found.folded
    proto = ir.serde.serialize_model(model)
    if folded:
        fold_into_norms(proto, Path())
    return Smoothed(graph=Graph.of(proto), together=frozenset(together), about=frozenset(about))


def _found(entering: ir.Value, artifact: Graph, before: Graph | None) -> _Found | None:
    """What an artifact does to an activation; None where it does nothing, or what it does cannot be read."""
    name, made = spread_name(entering.name or ""), entering.producer()
    if name not in artifact.producer:
        return None
    folded = artifact.nodes[artifact.producer[name]].op_type in _NORMS
    held = before if before is not None and name in before.producer else artifact
    channels = _written(held, name)
    if channels is None and folded and made is not None and made.op_type in _NORMS:
        channels = _worked_out(made, artifact, name)
        return None if channels is None else _Found(channels, folded, exact=False)
    return None if channels is None else _Found(channels, folded, exact=True)


def _written(graph: Graph, name: str) -> Channels | None:
    """The constants that make a changed activation, factor and shift (k,) float32 each."""
    node, shift = graph.nodes[graph.producer[name]], None
    if node.op_type == "Add" and node.input[1] in graph.initialisers and node.input[0] in graph.producer:
        shift, node = graph.array(node.input[1]), graph.nodes[graph.producer[node.input[0]]]
    if node.op_type != "Mul" or node.input[1] not in graph.initialisers:
        return None
    return _positive(graph.array(node.input[1]), shift)


def _worked_out(made: ir.Node, artifact: Graph, name: str) -> Channels | None:
    """Factor and shift that were folded into a normalisation, from its weight and bias before and after."""
    norm = artifact.nodes[artifact.producer[name]]
    stored = [norm.input[at] for at in _NORMS[norm.op_type] if at < len(norm.input)]
    sources = [made.inputs[at] for at in _NORMS[made.op_type] if at < len(made.inputs)]
    own = [value.const_value.numpy() for value in sources if value is not None and value.const_value is not None]
    if len(own) != len(stored) or len(own) != 2 or any(one not in artifact.initialisers for one in stored):
        return None
    (weight, bias), (new_weight, new_bias) = (
        [array.astype(np.float64) for array in pair] for pair in (own, [artifact.array(one) for one in stored])
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(weight == 0, 1.0, new_weight / weight)
    shift = new_bias - bias * factor
    # Layers without a bias have no shift; what is left then is the rounding of the folded bias.
    moved = bool((np.abs(shift) > _DIGITS * (np.abs(new_bias) + np.abs(bias * factor))).any())
    return _positive(factor.astype(np.float32), shift.astype(np.float32) if moved else None)


def _positive(factor: np.ndarray, shift: np.ndarray | None) -> Channels | None:
    """Channels, unless a factor cannot be one of ours: (k,) float32, positive."""
    good = factor.ndim == 1 and bool((np.isfinite(factor) & (factor > 0)).all())
    return Channels(factor=factor, shift=shift) if good else None


def _can_follow(layer: LinearLayer, channels: Channels) -> bool:
    """Whether a layer reads that many channels, and has a bias that makes up for the shift."""
    fits = channels.factor.shape == stored_as_rows(layer).shape[1:]
    return fits and (channels.shift is None or not channels.shift.any() or bias_of(layer) is not None)


def _changed(
    model: ir.Model, entering: ir.Value, layers: list[LinearLayer], channels: Channels, artifact: Graph
) -> set[str]:
    """Lets layers read the changed activation, as `graphs.quantise` does but in float32.

    Returns:
        Names of the constants that depend on the factors.
    """
    names: set[str] = set()
    made = entering.producer()
    if made is not None and made.op_type in _NORMS:
        names.update(value.name or "" for value in made.inputs[1:] if value is not None)
    read, size = spread(model, entering, channels), None
    if size_name(read.name or "") in artifact.producer:
        read, size = unit_rows(model, read)
    for layer in layers:
        bias = bias_of(layer)
        if bias is not None:
            names.add(bias.name or "")
            correct_bias(layer, channels)
        rows = spread_weight(stored_as_rows(layer).astype(np.float32), channels)
        stored = np.ascontiguousarray(rows if layer.transposed else rows.T)
        layer.weight.const_value = ir.tensor(stored, name=layer.weight.name)
        layer.node.replace_input_with(0, read)
        result = layer.node.outputs[0]
        # With two terms the sum is what the layer gives; the first product alone has no counterpart in float32.
        if (both := f"{second_name(layer.weight.name or '')}.sum") in artifact.producer:
            result.name = both
        if size is not None:
            scale_back(model, result, size)
    return names
