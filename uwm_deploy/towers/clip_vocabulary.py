"""CLIP's byte-pair vocabulary, which every OpenAI-style model shares, from the file that open_clip ships."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

_MERGES = 49152 - 256 - 2
"""Merges in use; the file holds more."""


@cache
def _merges() -> tuple[tuple[str, str], ...]:
    import open_clip

    file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    return tuple((left, right) for left, right in (line.split() for line in lines))


def _byte_letters() -> list[str]:
    """One printable letter per byte, in the order of the vocabulary: printable bytes first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def clip_vocabulary(start: str, end: str) -> tuple[dict[str, int], Any]:
    """Token to id, and the merges.

    Args:
        start: Name of the start token, which libraries spell differently.
        end: Name of the end token.
    """
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in _merges()), start, end]
    return {token: number for number, token in enumerate(tokens)}, list(_merges())
