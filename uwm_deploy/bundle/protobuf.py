"""The wire format of protobuf, as far as ONNX files need it without the package `onnx`."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

VARINT, EIGHT_BYTES, SIZED, FOUR_BYTES = 0, 1, 2, 5
"""Wire types."""


def varint(number: int) -> bytes:
    """A non-negative number, seven bits per byte, lowest first."""
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def fields(data: bytes | mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number of each field of a message, and where its content begins and ends.

    Raises:
        ValueError: If it is no whole message; also IndexError.
    """
    while position < end:
        key, position = read_varint(data, position)
        kind = key & 7
        if kind == VARINT:
            _, last = read_varint(data, position)
        elif kind == SIZED:
            size, position = read_varint(data, position)
            last = position + size
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            last = position + (8 if kind == EIGHT_BYTES else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if last > end:
            raise ValueError("it ends too early")
        yield key >> 3, position, last
        position = last


def read_varint(data: bytes | mmap.mmap, position: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("a number has too many bytes")
