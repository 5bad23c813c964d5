"""Small results as they are: a name and a value on each line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plain_lines(body: Mapping[str, Any], indent: str = "") -> list[str]:
    """Lines of plain data; what is nested stands further right."""
    lines = []
    for key, value in body.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", *plain_lines(value, indent + "  ")]
        elif isinstance(value, list):
            lines += [f"{indent}{key}", *(f"{indent}  {item}" for item in value)]
        else:
            lines.append(f"{indent}{key:<24} {value}")
    return lines
