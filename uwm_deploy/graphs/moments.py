"""Statistics of the channels of a graph's activations on calibration inputs: ranges, means, second moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from uwm_deploy.graphs.ranges import opened_for

_PASS_BYTES = 1 << 29
"""Bytes of second moments that one pass over the inputs collects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStatistics:
    """What one activation does on calibration inputs.

    Attributes:
        low: (k,) float64, smallest value of each channel.
        high: (k,) float64, largest value of each channel.
        mean: (k,) float64.
        moments: (k, k) float64, mean product of every two channels.
    """

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    moments: np.ndarray


def channel_statistics(
    source: Path, names: Sequence[str], batches: Sequence[np.ndarray], folder: Path
) -> dict[str, ChannelStatistics]:
    """Statistics of activations, over all rows of all inputs.

    Args:
        source: Float32 ONNX file.
        names: Activations; their last axis are the channels.
        batches: Batches of inputs, (b, ...) float32 pixels or int64 ids.
        folder: Folder for a temporary file.
    """
    model = ir.load(source)
    sizes = {name: _channels(_values(model)[name]) for name in names}
    found: dict[str, ChannelStatistics] = {}
    for part in _passes(sizes):
        found |= _collected(source, part, batches, folder)
    return found


def _passes(sizes: dict[str, int]) -> Iterator[list[str]]:
    part: list[str] = []
    for name, size in sizes.items():
        if part and 4 * (sum(sizes[other] ** 2 for other in part) + size**2) > _PASS_BYTES:
            yield part
            part = []
        part.append(name)
    if part:
        yield part


def _collected(
    source: Path, names: Sequence[str], batches: Sequence[np.ndarray], folder: Path
) -> dict[str, ChannelStatistics]:
    model = ir.load(source)
    outputs = [output for name in names for output in _watched(model, name)]
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
    session, given = opened_for(model, source, folder)
    sums: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        got = session.run(None, given(batch))
        for place, name in enumerate(names):
            low, high, total, moments, shape = (np.asarray(one, np.float64) for one in got[5 * place : 5 * place + 5])
            new = [low, high, total, moments, shape[:1]]
            old = sums.get(name)
            sums[name] = new if old is None else [
                np.minimum(old[0], low), np.maximum(old[1], high), *(a + b for a, b in zip(old[2:], new[2:], strict=True))
            ]  # fmt: skip
    return {
        name: ChannelStatistics(low=low, high=high, mean=total / rows, moments=moments / rows)
        for name, (low, high, total, moments, rows) in sums.items()
    }


def _watched(model: ir.Model, name: str) -> list[ir.Value]:
    """Smallest, largest and summed channels, second moments and shape of one activation, as values of the graph."""
    value = _values(model)[name]
    flat = _node(model, "Reshape", [value, _integers(model, f"{name}.flat", [-1, _channels(value)])], f"{name}.rows")
    axis = _integers(model, f"{name}.axis", [0])
    reduced = [
        _node(model, kind, [flat, axis], f"{name}.{kind}", {"keepdims": 0})
        for kind in ("ReduceMin", "ReduceMax", "ReduceSum")
    ]
    turned = _node(model, "Transpose", [flat], f"{name}.turned", {"perm": [1, 0]})
    product = _node(model, "MatMul", [turned, flat], f"{name}.moments")
    return [*reduced, product, _node(model, "Shape", [flat], f"{name}.shape", kind=ir.DataType.INT64)]


def _node(
    model: ir.Model,
    operator: str,
    inputs: list[ir.Value],
    name: str,
    attributes: dict[str, int | list[int]] | None = None,
    kind: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    node = ir.node(operator, inputs, attributes or {})
    output: ir.Value = node.outputs[0]
    output.name, output.dtype = name, kind
    model.graph.append(node)
    return output


def _integers(model: ir.Model, name: str, numbers: list[int]) -> ir.Value:
    tensor = ir.tensor(np.asarray(numbers, np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for node in model.graph for value in node.outputs}


def _channels(value: ir.Value) -> int:
    assert value.shape is not None
    return int(value.shape[-1])
