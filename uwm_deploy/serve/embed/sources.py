"""Items of a folder, of WebDataset shards, or of tables, one after the other; nothing is read before it is asked for."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import IO, Any

from uwm_deploy.data.archive import expanded, key_and_ending, members
from uwm_deploy.data.finding import is_file, is_folder, is_there, matching, walked
from uwm_deploy.data.parquet import parquet_file, table_errors
from uwm_deploy.data.patterns import path_below
from uwm_deploy.data.rows import JsonLines
from uwm_deploy.errors import DataError, InputError, MissingFileError, unreadable
from uwm_deploy.records.names import hides
from uwm_deploy.runtime.image import MAX_BYTES
from uwm_deploy.serve.embed.batch import ItemKind

ENDINGS: Mapping[ItemKind, tuple[str, ...]] = {
    "images": ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"),
    "texts": ("txt",),
}
_LARGEST_TEXT = 1 << 20
_ROWS_AT_A_TIME = 16
_TYPES = "name another column: --column; images are bytes or paths, texts are texts"

Content = bytes | Path | str


@dataclass(frozen=True, slots=True)
class Item:
    """One item.

    Attributes:
        key: Its key.
        load: Reads it, to be called before the next item is asked for; a DataError is the item's error, and a
            MissingFileError says that it has none yet.
    """

    key: str
    load: Callable[[], Content]


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """Where a table has what.

    Attributes:
        kind: What the items are.
        key: Column with keys.
        column: Column with images (bytes, a struct with bytes, or paths below the table's folder) or texts.
    """

    kind: ItemKind
    key: str
    column: str


def files_of(source: str) -> list[Path]:
    """The folder, or the shards and tables that a name with brace ranges or wildcards stands for.

    Raises:
        InputError: If there is none, or one is of no known kind.
    """
    if is_folder(source):
        return [Path(source)]
    found: list[Path] = []
    for name in expanded(source):
        paths = matching(name, Path()) if glob.has_magic(name) else [Path(name)]
        if lost := [path for path in paths or [Path(name)] if not is_file(path)]:
            raise InputError(f"{lost[0]} does not exist", fix="pass a folder, .tar shards, .parquet or .jsonl")
        found += paths
    for path in found:
        if path.suffix not in _READERS:
            raise InputError(f"{path} is of no known kind", fix="pass a folder, .tar shards, .parquet or .jsonl")
    return found


def items_of(path: Path, naming: Naming) -> Iterator[Item]:
    """Items of one folder, shard or table, in an order that does not change.

    Raises:
        DataError: If it is broken, perhaps after some items.
    """
    read = _folder_items if is_folder(path) else _READERS[path.suffix]
    for item in read(path, naming):
        if hides(item.key):
            raise DataError(
                f"{path}: key {item.key!r} holds a character that shows nothing",
                fix="remove control and formatting characters",
            )
        yield item


def _folder_items(folder: Path, naming: Naming) -> Iterator[Item]:
    for root, folders, names in walked(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root) / name
            if not name.startswith(".") and path.suffix[1:].lower() in ENDINGS[naming.kind]:
                # A name that is no UTF-8 is a name all the same.
                key = os.fsencode(path.relative_to(folder).as_posix()).decode(errors="backslashreplace")
                yield Item(key, partial(_text_of if naming.kind == "texts" else _image_at, path))


def _tar_items(path: Path, naming: Naming) -> Iterator[Item]:
    """Members that share a key stand together, as in every WebDataset; the last ones count once the end was seen."""
    with _opened(path) as stream:
        load = partial(_load_member, stream.fileno(), path, naming.kind)
        key, places = "", dict[str, tuple[int, int]]()
        for member in members(path):
            found, ending = key_and_ending(member.name)
            if not found or not member.isreg() or member.issparse():
                continue
            if found != key and key:
                yield Item(key, partial(load, places))
            if found != key:
                key, places = found, {}
            places[ending] = (member.offset_data, member.size)
        if key:
            yield Item(key, partial(load, places))


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(f"shard {path}", error, fix="check the path") from error


def _load_member(descriptor: int, path: Path, kind: ItemKind, places: Mapping[str, tuple[int, int]]) -> Content:
    wanted = [ending for ending in places if ending in ENDINGS[kind]]
    if len(wanted) != 1:
        have = ", ".join(f".{ending}" for ending in places)
        raise DataError(
            f"{len(wanted)} members are {kind}; they are {have}", fix=f"one of .{', .'.join(ENDINGS[kind])}"
        )
    offset, size = places[wanted[0]]
    if size > (MAX_BYTES if kind == "images" else _LARGEST_TEXT):
        raise DataError(
            f"it has {size} bytes", fix=f"keep images below {MAX_BYTES} and texts below {_LARGEST_TEXT} bytes"
        )
    try:
        data = os.pread(descriptor, size, offset)
    except (OSError, MemoryError) as error:
        raise unreadable(f"shard {path}", error, fix="check the file") from error
    if len(data) != size:
        raise InputError(f"shard {path} was cut while it was read", fix="start again")
    return data if kind == "images" else _decoded(data)


def _parquet_items(path: Path, naming: Naming) -> Iterator[Item]:
    number = 0
    with table_errors(path), parquet_file(path) as file:
        _check_columns(file.schema_arrow, naming, path)
        for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=[naming.key, naming.column], use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield _row_item(row, naming, path, f"{path} row {number}")


def _check_columns(schema: Any, naming: Naming, path: Path) -> None:
    """A column of another type is none of its rows' fault, and would make every one of them a broken item for ever."""
    _check_named(schema.names, naming, path)
    kind = schema.field(naming.column).type
    if not _fits(kind, naming.kind):
        raise InputError(f"{path}: column {naming.column!r} is of type {kind}", fix=_TYPES)


def _fits(kind: Any, items: ItemKind) -> bool:
    """Whether a column of this type can hold such items; one that is empty throughout can."""
    from pyarrow import types  # type: ignore[import-untyped]  # it has no annotations

    kind = getattr(kind, "storage_type", kind)
    if types.is_dictionary(kind):
        return _fits(kind.value_type, items)
    if types.is_null(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return True
    if items == "texts":
        return False
    if types.is_struct(kind):
        return bool({"bytes", "path"} & {field.name for field in kind})
    tests = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _check_named(have: Iterable[str], naming: Naming, path: Path) -> None:
    names = list(have)
    if lost := [name for name in (naming.key, naming.column) if name not in names]:
        raise InputError(
            f"{path} has no column {lost[0]!r}; it has {', '.join(names)}", fix="name it: --key and --column"
        )


def _json_items(path: Path, naming: Naming) -> Iterator[Item]:
    for number, (where, row) in enumerate(JsonLines(path).scan(())):
        if number == 0:  # the first row speaks for the column: no other place says its type
            _check_named(row, naming, path)
            value = row[naming.column]
            if not isinstance(value, (str, NoneType, Mapping) if naming.kind == "images" else (str, NoneType)):
                raise InputError(f"{where}: {naming.column!r} is {str(value)[:40]!r}", fix=_TYPES)
        yield _row_item(row, naming, path, where)


_READERS = {".tar": _tar_items, ".parquet": _parquet_items, ".jsonl": _json_items, ".ndjson": _json_items}


def _row_item(row: Mapping[str, Any], naming: Naming, path: Path, where: str) -> Item:
    key = row.get(naming.key)
    if isinstance(key, bool) or not isinstance(key, (str, int)) or key == "":
        raise DataError(
            f"{where}: key {naming.key!r} is {str(key)[:40]!r}", fix="name a column of texts or numbers: --key"
        )
    text = str(key).encode(errors="backslashreplace").decode()  # JSON can hold half a character
    return Item(text, partial(_value, row.get(naming.column), naming, path.parent, where))


def _value(value: Any, naming: Naming, folder: Path, where: str) -> Content:
    if naming.kind == "images" and isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise DataError(f"it has no {naming.column!r}", fix="leave it out, or name another column: --column")
    if isinstance(value, str):
        return value if naming.kind == "texts" else _image_at(path_below(folder, value, where))
    if isinstance(value, bytes) and naming.kind == "images":
        return value
    raise DataError(f"{naming.column!r} is a {type(value).__name__}", fix=_TYPES)


def _text_of(path: Path) -> str:
    if is_there(path) and not is_file(path):  # a pipe would be waited for
        raise DataError("it is no plain file", fix="leave it out")
    try:
        if path.stat().st_size > _LARGEST_TEXT:
            raise DataError(f"it has {path.stat().st_size} bytes", fix=f"keep texts below {_LARGEST_TEXT} bytes")
        return _decoded(path.read_bytes())
    except (OSError, MemoryError) as error:
        raise unreadable(str(path), error, fix="check the file") from error


def _image_at(path: Path) -> Path:
    """The path of an image that is there; it is read when it is embedded."""
    if not is_there(path):
        raise MissingFileError(f"{path} does not exist", fix="check the path, and that its disk is mounted")
    return path


def _decoded(data: bytes) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8: {error}", fix="write it as UTF-8") from error
