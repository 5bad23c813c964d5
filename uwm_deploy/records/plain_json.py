"""JSON from outside: whatever a text is, it is a value or a `ValueError`."""

from __future__ import annotations

import json
from typing import Any


def value_from_json(content: str | bytes) -> Any:
    """What JSON says.

    Args:
        content: The text, or its bytes.

    Raises:
        ValueError: If it is not JSON, has a number of thousands of digits, or is nested too deep to be read.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """What a parser of text says is wrong; of depth and of long numbers it speaks in terms of Python's own limits."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return "a number has thousands of digits" if "int_max_str_digits" in str(error) else str(error)
