"""A float32 graph in lower precision, in memory: convert writes it, and verify makes it again to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.cast import BFLOAT16, FLOAT16, cast_graph
from uwm_deploy.graphs.layers import linear_layers, matching_nodes
from uwm_deploy.graphs.quantise import LARGEST, NEAREST, EightBitType, input_names, quantise_graph, quantise_weights
from uwm_deploy.graphs.smoothing import Chosen, spread_name
from uwm_deploy.records.graph import Precision

HALF = {Precision.FP16: FLOAT16, Precision.BF16: BFLOAT16}
EIGHT_BITS: dict[Precision, EightBitType] = {Precision.INT8: "int8", Precision.FP8: "fp8"}
"""Precisions whose activations have ranges."""


def lowered_graph(
    source: Path,
    precision: Precision,
    keep: Sequence[str],
    largest: Mapping[str, float],
    chosen: Chosen = NEAREST,
) -> tuple[ir.Model, int]:
    """A graph in lower precision, in memory.

    Args:
        source: Float32 ONNX file.
        precision: Half precision casts everything, 8 bits quantises linear layers, `w8a16` their weights alone.
        keep: Linear layers, and globs over layers, nodes and operators, that stay in float32.
        largest: Largest absolute value of each activation, for 8 bits.
        chosen: What was chosen on calibration inputs, for INT8.

    Returns:
        The graph, and the number of clamped constants.

    Raises:
        ContractError: If the graph does not say the types of its values, or a value is out of range.
        InputError: If a pattern matches nothing.
    """
    model = ir.load(source)
    if untyped := [value.name for node in model.graph for value in node.outputs if value.dtype is None]:
        raise ContractError(f"{source.name} does not say the type of {untyped[0]}", fix="export it again")
    kept = matching_nodes(model, keep)
    names = linear_layers(model)
    if precision in HALF:
        return model, cast_graph(model, HALF[precision], kept)
    low = {name for name, layer in names.items() if layer.node not in kept}
    if precision is Precision.W8A16:
        quantise_weights(model, low)
        return model, 0
    quantise_graph(model, low, largest, EIGHT_BITS[precision], chosen)
    return model, 0


def largest_in(lowered: ir.Model, source: Path, precision: Precision) -> dict[str, float]:
    """Largest absolute value of each activation that a graph in 8 bits was quantised with, read back from its scales.

    Args:
        lowered: The graph in 8 bits.
        source: The float32 graph it was made from.
        precision: Of the graph in 8 bits.
    """
    model, found = ir.load(source), {}
    for name in input_names(model, set(linear_layers(model))).values():
        for part in (name, spread_name(name)):
            scale = lowered.graph.initializers.get(f"{part}.scale")
            if scale is None or scale.const_value is None or scale.const_value.size != 1:
                continue
            found[part] = float(scale.const_value.numpy().reshape(-1)[0]) * LARGEST[EIGHT_BITS[precision]]
    return found
