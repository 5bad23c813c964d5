"""The order of operators in an ONNX file whose weights are in 8 bits: each is made float32 just before it is used.

ONNX Runtime can run operators in the order of the file, but it writes files with every weight made float32 before all else.
That takes as much memory as float32 weights do. This works on the bytes of a file, since the base install has no onnx.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from uwm_deploy.bundle.protobuf import SIZED, fields, varint

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
"""Fields of a model, and of its graph."""

_INPUT, _OUTPUT, _OP_TYPE, _NAME = 1, 2, 4, 8
"""Fields of a node, and the name of a tensor."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One field of a message: its number, and where it, and its content, begin and end."""

    field: int
    start: int
    first: int
    end: int


def weights_before_use(model: bytes) -> bytes:
    """An ONNX file with every node that makes a weight float32 in front of the first node that reads it.

    Args:
        model: Content of an ONNX file; nothing else of it is changed.

    Raises:
        ValueError: If it is none.
    """
    view = memoryview(model)
    written: list[bytes | memoryview] = []
    for part in _parts(model, 0, len(model)):
        if part.field != _GRAPH:
            written.append(view[part.start : part.end])
            continue
        graph = _reordered(model, list(_parts(model, part.first, part.end)))
        size = sum(one.end - one.start for one in graph)
        written += [varint(_GRAPH << 3 | SIZED), varint(size), *(view[one.start : one.end] for one in graph)]
    return b"".join(written)


def _reordered(model: bytes, graph: list[_Part]) -> list[_Part]:
    weights = {_texts(model, part, _NAME)[0] for part in graph if part.field == _INITIALIZER}
    nodes = [part for part in graph if part.field == _NODE]
    waiting: dict[bytes, _Part] = {}
    for node in nodes:
        if _texts(model, node, _OP_TYPE) == [b"DequantizeLinear"] and _texts(model, node, _INPUT)[0] in weights:
            waiting[_texts(model, node, _OUTPUT)[0]] = node
    moved, ordered = set(waiting.values()), list[_Part]()
    for node in nodes:
        if node not in moved:
            ordered += [waiting.pop(name) for name in _texts(model, node, _INPUT) if name in waiting]
            ordered.append(node)
    # What is left is read by no node of this graph: by a nested one, perhaps, so it stays in front.
    return [*waiting.values(), *ordered, *(part for part in graph if part.field != _NODE)]


def _texts(model: bytes, part: _Part, field: int) -> list[bytes]:
    """Content of each field of a number, as it is."""
    return [model[first:end] for number, first, end in fields(model, part.first, part.end) if number == field]


def _parts(model: bytes, start: int, end: int) -> Iterator[_Part]:
    for field, first, last in fields(model, start, end):
        yield _Part(field, start, first, last)
        start = last
