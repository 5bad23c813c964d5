"""Writes ONNX files without a second copy of the weights in memory: they are streamed into the file."""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from uwm_deploy.bundle.protobuf import varint
from uwm_deploy.records.files import digest_of_file, joined_digest
from uwm_deploy.records.model import Digest

LARGE = 1024
"""Initialisers with more bytes are streamed; smaller ones stay in the graph's own message."""

INLINE_BYTES = 1_800_000_000
"""Above this the weights go into a second file: one protobuf file cannot hold 2 GiB."""

ALIGNMENT = 64
"""The bytes of a large initialiser begin at a multiple of this, so that readers can use them in the mapped file."""

_GRAPH, _INITIALIZER, _RAW_DATA, _DOC_STRING = (7, 5, 9, 12)
"""Field numbers of ModelProto.graph, GraphProto.initializer, TensorProto.raw_data and TensorProto.doc_string."""


def weightless(model: ir.Model) -> onnx.ModelProto:
    """The model's message for a checker, with a typed input in place of every large initialiser."""
    proto, large = _frame(model)
    for value in large:
        assert value.const_value is not None
        kind, shape = int(value.const_value.dtype), list(value.const_value.shape)
        proto.graph.input.append(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    return proto


def write_graph(model: ir.Model, path: Path, external: str = "") -> Digest:
    """Writes a model; the same model gives the same bytes.

    Args:
        model: Graph with its weights.
        path: File to write.
        external: Name of a second file, beside it, for the weights; needed from 2 GiB on.

    Returns:
        Digest over the written files.
    """
    if external:
        (path.parent / external).unlink(missing_ok=True)  # the writer appends
        ir.save(model, path, external_data=external, size_threshold_bytes=LARGE)
        return joined_digest([digest_of_file(part) for part in (path, path.parent / external)])
    proto, large = _frame(model)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    start = proto.SerializeToString(deterministic=True)
    total, heads = _layout(len(start), len(graph), large)
    with path.open("wb") as stream, _Hashed(stream) as hashed:
        hashed.write(start + _opened(_GRAPH, total) + graph)
        for value, head in zip(large, heads, strict=True):
            hashed.write(head)
            hashed.write(_array(value).data)
    return hashed.digest


class _Hashed:
    """Writes to a stream, and hashes the written data at the same time."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._hasher = stream, hashlib.sha256()
        self._pool, self._waiting = ThreadPoolExecutor(1), deque[Future[None]]()

    def write(self, data: bytes | memoryview) -> None:
        """Writes data, which must not change until the block ends."""
        self._waiting.append(self._pool.submit(self._hasher.update, data))
        self._stream.write(data)
        if len(self._waiting) > 2:  # some are copies, which should not pile up
            self._waiting.popleft().result()

    def __enter__(self) -> _Hashed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    @property
    def digest(self) -> Digest:
        """Digest of all written data."""
        return "sha256:" + self._hasher.hexdigest()


def _layout(start: int, graph: int, large: list[ir.Value]) -> tuple[int, list[bytes]]:
    """Size of the graph's field, and the bytes in front of the data of each large initialiser.

    Args:
        start: Number of bytes before the graph's field.
        graph: Number of bytes of the graph without large initialisers.
        large: The large initialisers.
    """
    total = graph + sum(_bytes_of(value) for value in large)
    while True:
        position = start + len(_opened(_GRAPH, total)) + graph
        heads, first = [], position
        for value in large:
            heads.append(_aligned_head(value, position))
            position += len(heads[-1]) + _bytes_of(value)
        if len(varint(total)) >= len(varint(graph + position - first)):
            break
        total = graph + position - first
    return graph + position - first, heads


def _aligned_head(value: ir.Value, position: int) -> bytes:
    """Bytes of an initialiser's field before its data, at a position of the file; a doc string of spaces aligns the data."""
    size, head = _bytes_of(value), _head(value)
    for room in range(2 * ALIGNMENT):
        text = _opened(_DOC_STRING, room) + b" " * room if room else b""
        full = head + text + _opened(_RAW_DATA, size)
        result = _opened(_INITIALIZER, len(full) + size) + full
        if (position + len(result)) % ALIGNMENT == 0:
            return result
    return result


def _frame(model: ir.Model) -> tuple[onnx.ModelProto, list[ir.Value]]:
    """The model's message without its large initialisers, and these initialisers."""
    with _without_weights(model) as large:
        proto = ir.to_proto(model)
    names = {value.name for value in large}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in names]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto, large


@contextlib.contextmanager
def _without_weights(model: ir.Model) -> Iterator[list[ir.Value]]:
    """Removes the data of large initialisers for as long as the block lasts; yields these initialisers."""
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
    """Data as the file stores it: contiguous, little-endian, (n,) uint8."""
    assert value.const_value is not None
    array = np.ascontiguousarray(value.const_value.numpy())
    return array.reshape(-1).view(np.uint8)


def _bytes_of(value: ir.Value) -> int:
    assert value.const_value is not None
    return int(value.const_value.nbytes)


def _opened(field: int, size: int) -> bytes:
    """Tag and length in front of a length-delimited field's content."""
    return varint(field << 3 | 2) + varint(size)
