"""Records to JSON and back, strictly: an unknown or missing field, a wrong type, NaN or a newer schema is an error."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from uwm_deploy.errors import InputError, IntegrityError, unreadable
from uwm_deploy.records.model import SCHEMA_VERSION
from uwm_deploy.records.plain_json import reason_of
from uwm_deploy.records.shape import (
    LATER,
    Choice,
    Enumeration,
    Items,
    Options,
    Record,
    Scalar,
    Shape,
    Table,
    fields_of,
    shape_of,
)

R = TypeVar("R")


def json_from_record(record: Any) -> str:
    """Canonical JSON of a record: sorted keys, with the schema version and the record's name, one trailing newline.

    Raises:
        IntegrityError: If a number in it is NaN or infinite: a report must not hold one.
    """
    body = {"schema_version": SCHEMA_VERSION, "record": type(record).__name__, **plain_from_record(record)}
    try:
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise IntegrityError(f"{type(record).__name__} holds NaN or infinity", fix="measure again") from error


def plain_from_record(value: Any) -> Any:
    """Dicts, lists and scalars of a (nested) record."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return {f.name: plain_from_record(item) for f, item in named if f.metadata != LATER or item != _default_of(f)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain_from_record(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain_from_record(item) for item in value]
    return value


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def record_from_json(cls: type[R], text: str | bytes, *, where: str) -> R:
    """Parses what `json_from_record` wrote.

    Args:
        cls: Expected record type.
        text: JSON.
        where: File name for error messages.

    Raises:
        IntegrityError: Anything that is not exactly such a record.
    """
    try:
        body = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text that could be written again
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{where} is not valid JSON: {reason_of(error)}", fix="restore the file or build again"
        ) from error
    if not isinstance(body, dict):
        raise IntegrityError(f"{where} is not a JSON object", fix="restore the file or build again")
    version, kind = body.pop("schema_version", None), body.pop("record", None)
    if version != SCHEMA_VERSION:
        raise IntegrityError(
            f"{where} has schema version {version!r}, this release reads {SCHEMA_VERSION}",
            fix="use the release that wrote it, or build again",
        )
    if kind != cls.__name__:
        raise IntegrityError(f"{where} holds a {kind!r}, not a {cls.__name__}", fix="pass the right file")
    result: R = _decode(shape_of(cls), body, where)
    return result


def read_record(cls: type[R], path: Path) -> R:
    """The record in a file that `write_record` wrote.

    Raises:
        InputError: If the file cannot be read.
        IntegrityError: If it holds anything that is not exactly such a record.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(str(path), error, fix="check the path", kind=InputError) from error
    return record_from_json(cls, content, where=path.name)


def write_record(path: Path, record: Any) -> None:
    """Writes a record into a folder that is not finished yet; `write_atomic` is for one that others read.

    Raises:
        IntegrityError: If a number in it is NaN or infinite.
    """
    path.write_text(json_from_record(record), encoding="utf-8")


def record_from_plain(cls: type[R], body: Mapping[str, Any], *, where: str) -> R:
    """Builds a record from plain data; see `record_from_json`."""
    result: R = _decode(shape_of(cls), dict(body), where)
    return result


def _decode(shape: Shape, value: Any, where: str) -> Any:
    return _DECODERS[type(shape)](shape, value, where)


def _decode_record(shape: Record, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(where, shape.name, value)
    fields = fields_of(shape.kind)
    shapes = fields.shapes
    unknown = sorted(name for name in value if name not in shapes)
    missing = sorted(name for name in fields.required if name not in value)
    if unknown or missing:
        raise IntegrityError(f"{where}: unknown fields {unknown}, missing fields {missing}", fix="build again")
    return shape.kind(**{name: _decode(shapes[name], item, f"{where}.{name}") for name, item in value.items()})


def _decode_options(shape: Options, value: Any, where: str) -> Any:
    if value is None and shape.nullable:
        return None
    if shape.record is not None and isinstance(value, dict):  # its own error names the field
        return _decode_record(shape.record, value, where)
    if isinstance(value, float) and not math.isfinite(value):  # of no option, and the kind would be right
        raise _mismatch(where, "a finite number", value)
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise _mismatch(where, "a number of at most 64 bits", value)
    for option in shape.options:
        try:
            return _decode(option, value, where)
        except IntegrityError:
            continue
    raise _mismatch(where, " or ".join(_PLAIN.get(name, name) for name in map(_named, shape.options)), value)


def _named(option: Shape) -> str:
    """What a reader of a file calls a type."""
    return f"a table with {', '.join(fields_of(option.kind).shapes)}" if isinstance(option, Record) else option.name


def _decode_items(shape: Items, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _mismatch(where, "a list", value)
    if shape.repeated:
        return tuple(_decode(shape.parts[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(shape.parts) != len(value):
        raise _mismatch(where, f"{len(shape.parts)} items", value)
    return tuple(
        _decode(part, item, f"{where}[{i}]") for i, (part, item) in enumerate(zip(shape.parts, value, strict=True))
    )


def _decode_table(shape: Table, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _mismatch(where, "an object", value)
    return {key: _decode(shape.item, item, f"{where}.{key}") for key, item in value.items()}


def _decode_choice(shape: Choice, value: Any, where: str) -> Any:
    if value not in shape.values:
        raise _mismatch(where, f"one of {shape.values}", value)
    return value


def _decode_enumeration(shape: Enumeration, value: Any, where: str) -> Enum:
    try:
        return shape.kind(value)
    except ValueError as error:
        raise _mismatch(where, f"one of {shape.values}", value) from error


def _decode_scalar(shape: Scalar, value: Any, where: str) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if not -_LARGEST <= value <= _LARGEST:  # no float, and no library, holds it
            raise _mismatch(where, "a number of at most 64 bits", value)
        if shape.kind is float:
            return float(value)
    if type(value) is not shape.kind:
        raise _mismatch(where, shape.name, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _mismatch(where, "a finite number", value)
    return value


_LARGEST = 2**64

_DECODERS: Mapping[type, Callable[[Any, Any, str], Any]] = {
    Record: _decode_record,
    Options: _decode_options,
    Items: _decode_items,
    Table: _decode_table,
    Choice: _decode_choice,
    Enumeration: _decode_enumeration,
    Scalar: _decode_scalar,
}


_PLAIN = {"float": "a number", "int": "a whole number", "str": "text in quotes", "bool": "true or false"}
"""What whoever writes a file calls a type."""


def _mismatch(where: str, expected: str, value: Any) -> IntegrityError:
    return IntegrityError(
        f"{where} should be {_PLAIN.get(expected, expected)}, is {_as_written(value)}", fix="build again"
    )


def _as_written(value: Any) -> str:
    """A value as it stands in a file, so that text and numbers are told apart."""
    plain = value is None or isinstance(value, str | bool | int | float | list | dict)
    try:
        return json.dumps(value, ensure_ascii=False, default=str)[:60] if plain else str(value)[:60]
    except ValueError:  # Python writes no number of thousands of digits, which TOML can hold in base 16
        return "a number of thousands of digits"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key appears twice")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")
