"""What a record's types ask of plain data: walked once per type, and read by decoding, JSON Schema and TOML files."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Final, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

LATER: Final[Mapping[str, bool]] = {"later": True}
"""Metadata of a field that files of older releases lack. It is not written where it has its default value, so that such a
file is still byte for byte what its record writes, and its bundle opens."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A string, a number, true or false; or nothing, which is an option of a union.

    Attributes:
        name: What a reader of a file calls it.
    """

    kind: type
    name: str


@dataclass(frozen=True, slots=True)
class Enumeration:
    """A value of an enum."""

    kind: type[Enum]
    name: str

    @property
    def values(self) -> list[Any]:
        """All that it can be."""
        return [member.value for member in self.kind]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the values that a `Literal` lists."""

    values: tuple[Any, ...]
    name: str


@dataclass(frozen=True, slots=True)
class Items:
    """A tuple: a list in a file.

    Attributes:
        parts: Shape of each item, or of all of them.
        repeated: Whether it is of all of them, however many there are.
    """

    parts: tuple[Shape, ...]
    repeated: bool
    name: str


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping from strings.

    Attributes:
        item: Shape of every value.
    """

    item: Shape
    name: str


@dataclass(frozen=True, slots=True)
class Options:
    """A union.

    Attributes:
        options: Its members but None, in order.
        nullable: Whether None is one of them.
        parts: All members in the order of the type, None among them.
        record: The record among them, where it is the only one: its own error says more than that of the union.
    """

    options: tuple[Shape, ...]
    nullable: bool
    parts: tuple[Shape, ...]
    record: Record | None
    name: str


@dataclass(frozen=True, slots=True)
class Record:
    """A dataclass; `fields_of` has its fields, which may hold the record itself."""

    kind: type
    name: str


Shape: TypeAlias = Scalar | Enumeration | Choice | Items | Table | Options | Record


@dataclass(frozen=True, slots=True)
class Fields:
    """Fields of a record.

    Attributes:
        shapes: Name to shape, in the order of the record.
        required: Names of those without a default, in the order of the record.
    """

    shapes: Mapping[str, Shape]
    required: tuple[str, ...]


@cache
def fields_of(record: type) -> Fields:
    """Fields of a dataclass; finding them out for each record again would take most of the time of opening a bundle."""
    hints, fields = get_type_hints(record), dataclasses.fields(record)
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    return Fields({f.name: shape_of(hints[f.name]) for f in fields}, tuple(required))


def shape_of(kind: Any) -> Shape:
    """Shape of a type that a field of a record can have."""
    # Not cached: unions that differ in the order of their members are equal, and the first that fits is taken.
    origin, arguments, name = get_origin(kind), get_args(kind), str(getattr(kind, "__name__", kind))
    if dataclasses.is_dataclass(kind):
        return Record(kind, name)  # type: ignore[arg-type]  # the test is also true for an instance, which no hint is
    if origin in (Union, types.UnionType):
        return _options(tuple(map(shape_of, arguments)), name)
    if origin is tuple:
        repeated = len(arguments) == 2 and arguments[1] is Ellipsis
        return Items(tuple(map(shape_of, arguments[:1] if repeated else arguments)), repeated, name)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return Table(shape_of(arguments[1]), name)
    if origin is Literal:
        return Choice(arguments, name)
    return Enumeration(kind, name) if isinstance(kind, type) and issubclass(kind, Enum) else Scalar(kind, name)


def _options(parts: tuple[Shape, ...], name: str) -> Options:
    nothing = shape_of(type(None))
    records = [part for part in parts if isinstance(part, Record)]
    return Options(
        tuple(part for part in parts if part != nothing),
        nothing in parts,
        parts,
        records[0] if len(records) == 1 else None,
        name,
    )
