"""Options of the command line as fields of frozen records: each field carries its click option."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import click

R = TypeVar("R")

_OPTION = "option"

PATH = click.Path(path_type=Path, readable=False)
FILE = click.Path(path_type=Path, dir_okay=False, readable=False)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False, readable=False)
SEED = click.IntRange(0, 2**62)
"""What every generator takes, with room to count on from there."""


def option(*names: str, default: Any = None, required: bool = False, **settings: Any) -> Any:
    """A field that is an option with a value.

    Args:
        names: On the command line, such as ``--out``; click's parameter has the field's name.
        default: Of the option and of the field; the help shows it unless it is empty.
        required: The option has no default.
        settings: The rest of what `click.option` takes.
    """
    if required:
        return dataclasses.field(metadata={_OPTION: (names, {"required": True, **settings})})
    settings = {"default": default, "show_default": bool(default), **settings}
    return dataclasses.field(default=default, metadata={_OPTION: (names, settings)})


def flag(*names: str, **settings: Any) -> Any:
    """A field that is true when its option is given."""
    return dataclasses.field(default=False, metadata={_OPTION: (names, {"is_flag": True, **settings})})


def repeated(*names: str, **settings: Any) -> Any:
    """A field with the values of an option that may be given several times, in their order."""
    return dataclasses.field(default=(), metadata={_OPTION: (names, {"multiple": True, **settings})})


def takes_options(command: Callable[..., R]) -> Callable[..., R]:
    """Gives a command the options of every record in its signature, and calls it with the records.

    A parameter whose type is a dataclass stands for the options of its fields, in their order. A field without an option
    is a record itself. The other parameters are the command's arguments.
    """
    hints = get_type_hints(command)
    records = {name: kind for name, kind in hints.items() if name != "return" and dataclasses.is_dataclass(kind)}
    options = [one for kind in records.values() for one in options_of(kind)]

    @functools.wraps(command)
    def with_records(**values: Any) -> R:
        _check_finite(options, values)
        made = {name: _record(kind, values) for name, kind in records.items()}
        return command(**made, **values)

    for name, names, settings in reversed(options):
        click.option(*names, name, **settings)(with_records)
    return with_records


def _check_finite(options: Iterable[tuple[str, tuple[str, ...], Mapping[str, Any]]], values: Mapping[str, Any]) -> None:
    """Refuses numbers that are none: a range of click takes nan, and nothing ever reaches such a threshold."""
    for name, names, _ in options:
        if isinstance(value := values.get(name), float) and not math.isfinite(value):
            raise click.BadParameter(f"{value} is no finite number", param_hint=repr(names[0]))


def options_of(kind: Any) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """Every option of a record and of the records in it: the field's name, the option's names, click's settings."""
    for field in dataclasses.fields(kind):
        if _OPTION in field.metadata:
            yield (field.name, *field.metadata[_OPTION])
        else:
            yield from options_of(get_type_hints(kind)[field.name])


def _record(kind: Any, values: dict[str, Any]) -> Any:
    """The record with what click found for its fields, which leaves `values`."""
    hints = get_type_hints(kind)
    return kind(
        **{
            field.name: values.pop(field.name) if _OPTION in field.metadata else _record(hints[field.name], values)
            for field in dataclasses.fields(kind)
        }
    )


def filled(kind: Callable[..., R], *records: Any, **more: Any) -> R:
    """A request made of what records of options say: their fields have the names of its fields.

    Args:
        kind: The request's type.
        records: Options; those of a record inside another one count as its own.
        more: Fields that no option gives, or not as it is.
    """
    return kind(**{**{name: value for record in records for name, value in _values(record)}, **more})


def _values(record: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if _OPTION in field.metadata:
            yield field.name, value
        else:
            yield from _values(value)
