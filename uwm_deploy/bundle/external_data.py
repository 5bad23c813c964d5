"""Where an ONNX graph says that its weights lie: checked here, because what opens graphs checks too little of it.

ONNX Runtime takes hard links and, from bytes in memory, looks for files in the working folder; TensorRT's parser compares
text only. So a graph is refused unless every tensor outside it lies within a file that its bundle lists beside it. Links
are refused where files are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from uwm_deploy.bundle.protobuf import fields, read_varint
from uwm_deploy.errors import IntegrityError

_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING = range(8)
"""Messages of an ONNX file that a tensor can lie in."""

_INSIDE: Mapping[int, Mapping[int, int]] = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
}
"""Kind of message to the fields that hold further messages, by number."""

_OP_TYPE, _EXTERNAL_DATA, _DATA_LOCATION = 4, 13, 14
"""Field of a node, and two of a tensor."""

_KEYS = {"location", "offset", "length", "checksum"}
_ELSEWHERE = b"EPContext"
"""Operator whose content is a compiled program, in the graph or in any file that it names."""

_FIX = "restore the bundle or build again"


def check_external_data(graph: bytes, beside: Mapping[str, int], *, where: str) -> None:
    """Refuses a graph with data anywhere else than within the files beside it.

    Args:
        graph: Content of an ONNX file.
        beside: Name of each file in its folder to its size in bytes.
        where: Path of the graph, for error messages.

    Raises:
        IntegrityError: If it is no ONNX file, has data elsewhere or out of bounds, or a compiled program as a node.
    """
    try:
        for data in _external(graph, where):
            _check(data, beside, where)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{where} is not a whole ONNX file: {error}", fix=_FIX) from error


def _external(graph: bytes, where: str) -> Iterator[list[tuple[str, str]]]:
    """Keys and values of every tensor that lies outside the graph, however deep it is nested."""
    waiting = [(_MODEL, 0, len(graph))]
    while waiting:
        kind, start, end = waiting.pop()
        inside = _INSIDE.get(kind, {})
        pairs: list[tuple[str, str]] = []
        outside = False
        for field, first, last in fields(graph, start, end):
            if field in inside:
                waiting.append((inside[field], first, last))
            elif kind == _TENSOR and field == _EXTERNAL_DATA:
                pairs.append(_pair(graph, first, last))
            elif kind == _TENSOR and field == _DATA_LOCATION:
                outside = outside or read_varint(graph, first)[0] != 0
            elif kind == _NODE and field == _OP_TYPE and graph[first:last] == _ELSEWHERE:
                raise IntegrityError(f"{where} holds a compiled program as a node ({_ELSEWHERE.decode()})", fix=_FIX)
        if outside or pairs:
            yield pairs


def _pair(graph: bytes, start: int, end: int) -> tuple[str, str]:
    parts = {1: "", 2: ""}
    for field, first, last in fields(graph, start, end):
        parts[field] = graph[first:last].decode()
    return parts[1], parts[2]


def _check(pairs: list[tuple[str, str]], beside: Mapping[str, int], where: str) -> None:
    about = dict(pairs)
    if len(about) != len(pairs) or not set(about) <= _KEYS or not {"location", "length"} <= set(about):
        raise IntegrityError(f"{where} describes data outside it by {sorted(k for k, _ in pairs)}", fix=_FIX)
    location = about["location"]
    if location not in beside:  # names of files have no folder, so nothing outside it can be meant
        raise IntegrityError(f"{where} has data in {location[:100]!r}, which is not beside it in the bundle", fix=_FIX)
    offset, length = (_number(about.get(key, "0"), where) for key in ("offset", "length"))
    if offset + length > beside[location]:
        raise IntegrityError(
            f"{where} has data at {offset} to {offset + length} of {location}, which has {beside[location]} bytes",
            fix=_FIX,
        )


def _number(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise IntegrityError(f"{where} has data at {text[:40]!r}, which is no offset", fix=_FIX)
    return int(text)
