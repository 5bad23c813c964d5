"""TOML files to records, strictly: an unknown key is an error that names the nearest valid one; nothing is inherited."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from typing import Any, TypeVar

from uwm_deploy.errors import IntegrityError, RecipeError
from uwm_deploy.records.codec import record_from_plain
from uwm_deploy.records.plain_json import reason_of
from uwm_deploy.records.shape import Items, Options, Record, Shape, fields_of

FORMAT = 1
"""Version of the TOML formats."""

R = TypeVar("R")


def record_from_toml(cls: type[R], text: str, where: str, *, docs: str = "docs/reference/recipes.md") -> R:
    """Parses a file of one kind.

    Args:
        cls: Record with a field per key.
        text: TOML.
        where: File for error messages.
        docs: Page that describes the format.

    Raises:
        RecipeError: With the file, the key and the nearest valid key.
    """
    try:
        body = tomllib.loads(text)
        _refuse_large_numbers(body, where)
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, tables nested 3,000 deep
        raise RecipeError(f"{where} is not valid TOML: {reason_of(error)}", fix="mend the line") from error
    _refuse_unknown_keys(cls, body, where, docs)
    if body.get("format") != FORMAT:
        raise RecipeError(f"{where}: format is {body.get('format')!r}", fix=f"this release reads format = {FORMAT}")
    try:
        return record_from_plain(cls, body, where=where)
    except IntegrityError as error:
        raise RecipeError(error.what, fix=f"see {docs}") from error


def _refuse_large_numbers(value: Any, where: str) -> None:
    """TOML promises 64 bits; Python reads more, and then cannot even print what is in base 16."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_large_numbers(item, f"{where}: {key}" if isinstance(item, int) else where)
    elif isinstance(value, list):
        for item in value:
            _refuse_large_numbers(item, where)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise RecipeError(f"{where} should be a number of at most 64 bits", fix="mend the line")


def _refuse_unknown_keys(kind: type, body: Mapping[str, Any], where: str, docs: str) -> None:
    fields = fields_of(kind)
    for key, value in body.items():
        if key not in fields.shapes:
            near = difflib.get_close_matches(key, list(fields.shapes), n=1, cutoff=0.3)
            raise RecipeError(
                f"{where}: unknown key {key!r}",
                fix=f"did you mean {near[0]!r}?" if near else f"valid: {sorted(fields.shapes)}",
            )
        inner = _record_in(fields.shapes[key])
        tables = value if isinstance(value, list) else [value]
        for number, table in enumerate(tables):
            if isinstance(table, dict) and inner:
                name = f"{key}[{number}]" if isinstance(value, list) else key
                _refuse_unknown_keys(inner, table, f"{where}: {name}", docs)
    if missing := [name for name in fields.required if name not in body]:
        raise RecipeError(f"{where}: missing key {missing[0]!r}", fix=f"see {docs}")


def _record_in(shape: Shape) -> type | None:
    """The record that a table under a key, or each of several, is for."""
    parts = shape.parts if isinstance(shape, Options | Items) else (shape,)
    return next((part.kind for part in parts if isinstance(part, Record)), None)
