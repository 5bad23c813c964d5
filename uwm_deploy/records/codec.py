"""Records to JSON and back, strictly: an unknown or missing field, a wrong type, NaN or a newer schema is an error."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.records.model import SCHEMA_VERSION

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
        return {f.name: plain_from_record(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain_from_record(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain_from_record(item) for item in value]
    return value


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
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where} is not valid JSON: {error}", fix="restore the file or build again") from error
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
    result: R = _decode(cls, body, where)
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
        raise InputError(f"{path} cannot be read: {error.strerror}", fix="check the path") from error
    return record_from_json(cls, content, where=path.name)


def write_record(path: Path, record: Any) -> None:
    """Writes a record into a folder that is not finished yet; `write_atomic` is for one that others read.

    Raises:
        IntegrityError: If a number in it is NaN or infinite.
    """
    path.write_text(json_from_record(record), encoding="utf-8")


def record_from_plain(cls: type[R], body: Mapping[str, Any], *, where: str) -> R:
    """Builds a record from plain data; see `record_from_json`."""
    result: R = _decode(cls, dict(body), where)
    return result


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_record(kind, value, where)
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(kind), value, where)
    if origin is tuple:
        return _decode_tuple(get_args(kind), value, where)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        return {key: _decode(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        if value not in get_args(kind):
            raise _mismatch(where, f"one of {get_args(kind)}", value)
        return value
    return _decode_scalar(kind, value, where)


def _decode_record(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(where, kind.__name__, value)
    hints, fields = _hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(value))
    if unknown or missing:
        raise IntegrityError(f"{where}: unknown fields {unknown}, missing fields {missing}", fix="build again")
    return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of the fields; finding them out again for each record would take most of the time of opening a bundle."""
    return get_type_hints(kind)


def _decode_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    records = [option for option in options if dataclasses.is_dataclass(option)]
    if isinstance(value, dict) and len(records) == 1:  # its own error names the field
        return _decode(records[0], value, where)
    for option in (o for o in options if o is not type(None)):
        try:
            return _decode(option, value, where)
        except IntegrityError:
            continue
    raise _mismatch(where, " or ".join(_named(o) for o in options if o is not type(None)), value)


def _named(option: Any) -> str:
    """What a reader of a file calls a type."""
    if dataclasses.is_dataclass(option):
        return f"a table with {', '.join(f.name for f in dataclasses.fields(option))}"
    return str(getattr(option, "__name__", option))


def _decode_tuple(options: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _mismatch(where, "a list", value)
    if len(options) == 2 and options[1] is Ellipsis:
        return tuple(_decode(options[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(options) != len(value):
        raise _mismatch(where, f"{len(options)} items", value)
    return tuple(
        _decode(option, item, f"{where}[{i}]") for i, (option, item) in enumerate(zip(options, value, strict=True))
    )


def _decode_scalar(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError as error:
            raise _mismatch(where, f"one of {[m.value for m in kind]}", value) from error
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise _mismatch(where, getattr(kind, "__name__", str(kind)), value)
    if kind is float and not math.isfinite(value):
        raise _mismatch(where, "a finite number", value)
    return value


def _mismatch(where: str, expected: str, value: Any) -> IntegrityError:
    return IntegrityError(f"{where} should be {expected}, is {str(value)[:60]!r}", fix="build again")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key appears twice")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")
