"""Small results as they are: a name and a value on each line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST_WORD = 72
"""Characters of a value without blanks that is printed whole: a digest is, a row of bits is not."""

_ITEMS = 100
"""Items of a list that are printed."""

_PARTS = 10
"""The same, of items that have several lines each."""


def plain_lines(body: Mapping[str, Any], indent: str = "") -> list[str]:
    """Lines of plain data; what is nested stands further right, and the rest of a long list is counted."""
    lines = []
    for key, value in body.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}", *plain_lines(value, indent + "  ")]
        elif isinstance(value, list) and value:
            lines += [f"{indent}{key}", *_items(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<24} {_shortened(value)}".rstrip())
    return lines


def _items(items: Sequence[Any], indent: str) -> list[str]:
    """One line per item, or several where it has parts."""
    shown = items[: _PARTS if any(isinstance(item, (Mapping, list)) for item in items) else _ITEMS]
    lines = []
    for item in shown:
        if isinstance(item, Mapping) and item:
            first, *others = plain_lines(item, indent + "  ")
            lines += [f"{indent}- {first.lstrip()}", *others]
        else:
            lines.append(f"{indent}{_shortened(item)}")
    more = len(items) - len(shown)
    return [*lines, f"{indent}... and {more} more, see --json"] if more else lines


def _shortened(value: object) -> str:
    if isinstance(value, (Mapping, list)):
        return ", ".join(map(str, value)) or "none"
    text = str(value)
    if len(text) <= _LONGEST_WORD or " " in text or "/" in text:
        return text
    return f"{text[: _LONGEST_WORD // 2]}... ({len(text)} characters, see --json)"
