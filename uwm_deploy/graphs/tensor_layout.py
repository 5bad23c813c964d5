"""Positions of the weights in an ONNX file."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from uwm_deploy.bundle.protobuf import fields, varint
from uwm_deploy.errors import IntegrityError, is_of_machine, unreadable

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Field numbers of ModelProto.graph, GraphProto.initializer and TensorProto.raw_data."""

_SMALL = 1024
"""Initialisers of at most this many bytes, such as shapes, stay in the graph's message."""

_ALIGNMENT = 8
"""Bytes of the largest element type, of which an address must be a multiple."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One initialiser.

    Attributes:
        name: Name in the graph.
        kind: Element type, a number of TensorProto.DataType.
        shape: Shape of the tensor.
        file: Name of the file that holds its bytes.
        offset: Position of the first byte in that file.
        size_bytes: Number of bytes.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    file: str
    offset: int
    size_bytes: int


def stored_tensors(path: Path, external: str = "") -> list[StoredTensor]:
    """Every initialiser whose bytes lie in one piece, in the graph's file or in its external data.

    Args:
        path: ONNX file.
        external: Name of its external data file beside it, or empty.

    Raises:
        IntegrityError: If it is no whole ONNX file, or names another file for its bytes.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return list(_tensors(data, path, external))
    except (ValueError, IndexError, DecodeError, OSError) as error:
        if is_of_machine(error):
            raise unreadable(path.name, error, fix="") from error
        raise IntegrityError(f"{path.name} is not a whole ONNX file: {error}", fix="build again") from error


def mapped_weights(path: Path) -> tuple[bytes, dict[str, np.ndarray]]:
    """A graph without its weights, and the weights as bytes of the mapped file.

    Args:
        path: ONNX file; external data lies beside it as ``<file>.data``.

    Returns:
        The graph's message, and the bytes of each weight by name, (n,) uint8, at an address that suits the weight's type.
    """
    beside = path.with_name(f"{path.name}.data")
    tensors = [t for t in stored_tensors(path, beside.name if beside.is_file() else "") if t.size_bytes > _SMALL]
    files = {name: np.memmap(path.with_name(name), np.uint8, "r") for name in {tensor.file for tensor in tensors}}
    found = {}
    for tensor in tensors:
        data = files[tensor.file][tensor.offset : tensor.offset + tensor.size_bytes]
        found[tensor.name] = data if tensor.offset % _ALIGNMENT == 0 else data.copy()
    return without_weights(path, tensors), found


def without_weights(path: Path, tensors: Sequence[StoredTensor]) -> bytes:
    """The graph's message, in which some initialisers are marked as external data that the reader provides.

    Args:
        path: ONNX file.
        tensors: Initialisers to leave out; only those that lie in this file are.
    """
    taken = {tensor.offset: tensor for tensor in tensors if tensor.file == path.name}
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        parts, begin = [], 0
        for field, start, end in fields(data, 0, len(data)):
            if field == _GRAPH:
                graph = b"".join(_graph_parts(data, start, end, taken))
                parts.append(varint(_GRAPH << 3 | 2) + varint(len(graph)) + graph)
            else:
                parts.append(data[begin:end])
            begin = end
        return b"".join(parts)


def _graph_parts(data: mmap.mmap, start: int, end: int, taken: Mapping[int, StoredTensor]) -> Iterator[bytes]:
    begin = start
    for field, first, last in fields(data, start, end):
        raw = [a for inner, a, _ in fields(data, first, last) if inner == _RAW_DATA] if field == _INITIALIZER else []
        if raw and raw[0] in taken:
            tensor = taken[raw[0]]
            head = onnx.TensorProto(name=tensor.name, dims=tensor.shape, data_type=tensor.kind)
            head.data_location = onnx.TensorProto.EXTERNAL
            head.external_data.add(key="location", value="-")
            body = head.SerializeToString()
            yield varint(_INITIALIZER << 3 | 2) + varint(len(body)) + body
        else:
            yield data[begin:last]
        begin = last


def _tensors(data: mmap.mmap, path: Path, external: str) -> Iterator[StoredTensor]:
    for field, start, end in fields(data, 0, len(data)):
        if field == _GRAPH:
            for inner, first, last in fields(data, start, end):
                if inner == _INITIALIZER and (tensor := _tensor(data, first, last, path, external)):
                    yield tensor


def _tensor(data: mmap.mmap, start: int, end: int, path: Path, external: str) -> StoredTensor | None:
    """An initialiser; None when its values are not stored as bytes."""
    raw, head, begin = None, b"", start
    for field, first, last in fields(data, start, end):
        if field == _RAW_DATA:
            raw = (first, last)
        else:
            head += data[begin:last]
        begin = last
    proto = onnx.TensorProto.FromString(head)
    shape = tuple(proto.dims)
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        about = {entry.key: entry.value for entry in proto.external_data}
        if not external or about.get("location") != external:
            raise IntegrityError(f"{proto.name} of {path.name} lies in another file", fix="build again")
        offset, size = int(about.get("offset", 0)), int(about.get("length", 0))
        return StoredTensor(proto.name, proto.data_type, shape, external, offset, size)
    if raw is None:
        return None
    return StoredTensor(proto.name, proto.data_type, shape, path.name, raw[0], raw[1] - raw[0])
