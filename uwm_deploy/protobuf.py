"""The one encoding that every field of a protobuf message begins with."""

from __future__ import annotations


def varint(number: int) -> bytes:
    """A non-negative number, seven bits per byte, lowest first."""
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)
