"""Ranges of a graph's activations on calibration inputs, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.write import INLINE_BYTES, write_graph


def activation_maxima(
    source: Path, names: Sequence[str], batches: Iterable[np.ndarray], folder: Path
) -> dict[str, np.ndarray]:
    """Largest absolute value of activations, per sample.

    The maxima are computed inside the graph, so memory does not grow with the size of the activations.

    Args:
        source: Float32 ONNX file.
        names: Activations; their first axis is the batch.
        batches: Batches of inputs, (b, ...) float32 pixels, uint8 crops or int64 ids.
        folder: Folder for a temporary file.

    Returns:
        Largest absolute value per sample, (n,) float32, by activation.

    Raises:
        ContractError: If an activation is not in the graph, or a maximum is not finite.
    """
    model = ir.load(source)
    wanted = list(dict.fromkeys(names))
    _watch(model, wanted)
    session, given = opened_for(model, source, folder)
    outputs = [_output_name(name) for name in wanted]
    rows = [session.run(outputs, given(batch)) for batch in batches]
    if not rows:
        raise ContractError("no input reached the graph, so its activations have no range", fix="use a larger set")
    maxima = {name: np.concatenate(parts) for name, parts in zip(wanted, zip(*rows, strict=True), strict=True)}
    for name, values in maxima.items():
        if not np.isfinite(values).all():
            raise ContractError(f"activation {name} is not finite", fix="mend the model or the inputs")
    return maxima


def opened_for(
    model: ir.Model, source: Path, folder: Path
) -> tuple[Any, Callable[[np.ndarray], dict[str, np.ndarray]]]:
    """Opens a graph with outputs of its own in ONNX Runtime.

    Args:
        model: The graph.
        source: The file it was read from.
        folder: Folder for a temporary file.

    Returns:
        The session, and what makes its input of a batch, (b, ...) float32 pixels or int64 ids.
    """
    import onnxruntime as ort

    path = folder / f".tmp-watched-{source.name}"
    external = f"{path.name}.data" if sum(v.const_value.nbytes for v in _weights(model)) > INLINE_BYTES else ""
    write_graph(model, path, external)
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    finally:
        for name in filter(None, (path.name, external)):
            (folder / name).unlink()
    given = model.graph.inputs[0]
    kind = given.dtype.numpy() if given.dtype else None  # ids may be int32 in the graph
    return session, lambda batch: {given.name or "": batch.astype(kind or batch.dtype, casting="same_kind", copy=False)}


def _weights(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.initializers.values() if value.const_value is not None]


def _output_name(name: str) -> str:
    return f"{name}.maximum"


def _watch(model: ir.Model, names: Sequence[str]) -> None:
    """Makes the maxima of some activations the only outputs of a graph."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in model.graph.inputs}
    model.graph.outputs.clear()
    for name in names:
        value = values.get(name)
        if value is None or value.shape is None or len(value.shape) < 2:
            raise ContractError(f"the graph has no activation {name} with a batch", fix="export it again")
        axes = ir.Value(
            name=f"{name}.axes", const_value=ir.tensor(np.arange(1, len(value.shape)), dtype=ir.DataType.INT64)
        )
        axes.dtype, axes.shape = ir.DataType.INT64, ir.Shape([len(value.shape) - 1])
        model.graph.register_initializer(axes)
        absolute = ir.node("Abs", [value])
        absolute.outputs[0].name = f"{name}.absolute"
        largest = ir.node("ReduceMax", [absolute.outputs[0], axes], {"keepdims": 0})
        output = largest.outputs[0]
        output.name, output.dtype, output.shape = _output_name(name), ir.DataType.FLOAT, ir.Shape(["batch"])
        model.graph.extend([absolute, largest])
        model.graph.outputs.append(output)
