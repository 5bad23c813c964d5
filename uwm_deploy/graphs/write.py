"""Writes ONNX files without holding a second copy of the weights: they go from where they are straight into the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from uwm_deploy.protobuf import varint

LARGE = 1024
"""Initialisers with more bytes are streamed; smaller ones stay in the graph's own message."""

INLINE_BYTES = 1_800_000_000
"""Above this the weights go into a second file: one protobuf file cannot hold 2 GiB."""

_GRAPH, _INITIALIZER, _RAW_DATA = (7, 5, 9)
"""Field numbers of ModelProto.graph, GraphProto.initializer and TensorProto.raw_data."""


def weightless(model: ir.Model) -> onnx.ModelProto:
    """The model's message with every large initialiser as a typed input instead; what a checker needs and no more."""
    proto, large = _frame(model)
    for value in large:
        assert value.const_value is not None
        kind, shape = int(value.const_value.dtype), list(value.const_value.shape)
        proto.graph.input.append(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    return proto


def write_graph(model: ir.Model, path: Path, external: str = "") -> None:
    """Writes a model; same model, same bytes.

    Args:
        model: Graph with its weights.
        path: Where to.
        external: Name of a second file, beside it, for the weights; needed from 2 GiB on.
    """
    if external:
        (path.parent / external).unlink(missing_ok=True)  # the writer appends
        ir.save(model, path, external_data=external, size_threshold_bytes=LARGE)
        return
    proto, large = _frame(model)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    heads = [_head(value) for value in large]
    sizes = [len(head) + _field_size(_RAW_DATA, _bytes_of(value)) for head, value in zip(heads, large, strict=True)]
    total = len(graph) + sum(_field_size(_INITIALIZER, size) for size in sizes)
    with path.open("wb") as stream:
        stream.write(proto.SerializeToString(deterministic=True))
        _open_field(stream, _GRAPH, total)
        stream.write(graph)
        for value, head, size in zip(large, heads, sizes, strict=True):
            _open_field(stream, _INITIALIZER, size)
            stream.write(head)
            _open_field(stream, _RAW_DATA, _bytes_of(value))
            stream.write(_array(value).data)


def _frame(model: ir.Model) -> tuple[onnx.ModelProto, list[ir.Value]]:
    """The model's message without its large initialisers, and those."""
    with _without_weights(model) as large:
        proto = ir.to_proto(model)
    names = {value.name for value in large}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in names]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto, large


@contextlib.contextmanager
def _without_weights(model: ir.Model) -> Iterator[list[ir.Value]]:
    """Large initialisers as references to nothing, for as long as the block lasts; yields them."""
    large = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > LARGE
    ]
    tensors = [value.const_value for value in large]
    try:
        for value, tensor in zip(large, tensors, strict=True):
            assert tensor is not None
            value.const_value = ir.ExternalTensor(
                "-", offset=None, length=None, dtype=tensor.dtype, shape=tensor.shape, name=value.name or ""
            )
        yield large
    finally:
        for value, tensor in zip(large, tensors, strict=True):
            value.const_value = tensor


def _head(value: ir.Value) -> bytes:
    """The tensor's message without its data."""
    assert value.const_value is not None
    tensor = onnx.TensorProto(
        name=value.name, dims=list(value.const_value.shape), data_type=int(value.const_value.dtype)
    )
    head: bytes = tensor.SerializeToString(deterministic=True)
    return head


def _array(value: ir.Value) -> np.ndarray:
    """Data as it lies in the file: contiguous, little-endian, as plain bytes."""
    assert value.const_value is not None
    array = np.ascontiguousarray(value.const_value.numpy())
    return array.reshape(-1).view(np.uint8)


def _bytes_of(value: ir.Value) -> int:
    assert value.const_value is not None
    return int(value.const_value.nbytes)


def _field_size(field: int, size: int) -> int:
    """Bytes of a length-delimited field with its content."""
    return len(varint(field << 3 | 2)) + len(varint(size)) + size


def _open_field(stream: BinaryIO, field: int, size: int) -> None:
    stream.write(varint(field << 3 | 2) + varint(size))
