"""Entries of a config table against the types that its library declares, for a library that checks none itself."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from uwm_deploy.errors import InputError

_WORDS: dict[Any, str] = {
    int: "a number", float: "a number", bool: "true or false", str: "a text", dict: "an object", type(None): "null",
}  # fmt: skip


def entries_of(kind: type) -> dict[str, Any]:
    """The fields of a dataclass and their types; one whose default is None may be null, whatever its type says."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: hints[field.name] | None if field.default is None else hints[field.name]
        for field in dataclasses.fields(kind)
    }


def check_entries(values: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Refuses entries that are unknown, or of another type than expected.

    Args:
        values: The table.
        expected: Type per entry; `int` and `float` both stand for a finite number.
        where: File and key of the table, for messages.

    Raises:
        InputError: With the first entry that is wrong.
    """
    for key, value in values.items():
        if key not in expected:
            near = difflib.get_close_matches(key, expected, n=1)
            raise InputError(
                f"{where} has an unknown entry {key!r}",
                fix=f"did you mean {near[0]}?"
                if near
                else "remove it, or install the release of the library that knows it",
            )
        if not _is(value, expected[key]):
            kinds = " or ".join(dict.fromkeys(_word(kind) for kind in _choices(expected[key])))
            raise InputError(f"{where}.{key} is {json.dumps(value)[:60]}", fix=f"it must be {kinds}")


def _choices(kind: Any) -> tuple[Any, ...]:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "a list of numbers"
    return _WORDS[kind]


def _is(value: object, kind: Any) -> bool:
    return any(_is_one(value, choice) for choice in _choices(kind))


def _is_one(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        count = len(typing.get_args(kind))
        return isinstance(value, list) and len(value) == count and all(_is_one(part, int) for part in value)
    if kind in (int, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)
