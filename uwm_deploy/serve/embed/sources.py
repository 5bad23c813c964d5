"""Items of a folder, of WebDataset shards, or of tables, one after the other; nothing is read before it is asked for."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from uwm_deploy.data.archive import expanded, key_and_ending, members
from uwm_deploy.data.parquet import parquet_module
from uwm_deploy.data.patterns import path_below
from uwm_deploy.data.rows import JsonLines
from uwm_deploy.errors import DataError, InputError
from uwm_deploy.runtime.image import MAX_BYTES
from uwm_deploy.serve.embed.batch import ItemKind

ENDINGS: Mapping[ItemKind, tuple[str, ...]] = {
    "images": ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"),
    "texts": ("txt",),
}
_LARGEST_TEXT = 1 << 20
_ROWS_AT_A_TIME = 16
_BUFFER_BYTES = 1 << 20

Content = bytes | Path | str


@dataclass(frozen=True, slots=True)
class Item:
    """One item.

    Attributes:
        key: Its key.
        load: Reads it, to be called before the next item is asked for; a DataError is the item's error.
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
    if Path(source).is_dir():
        return [Path(source)]
    found: list[Path] = []
    for name in expanded(source):
        paths = [Path(path) for path in sorted(glob.glob(name))] if glob.has_magic(name) else [Path(name)]
        if lost := [path for path in paths or [Path(name)] if not path.is_file()]:
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
    read = _folder_items if path.is_dir() else _READERS[path.suffix]
    return read(path, naming)


def _folder_items(folder: Path, naming: Naming) -> Iterator[Item]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root) / name
            if not name.startswith(".") and path.suffix[1:].lower() in ENDINGS[naming.kind]:
                # A name that is no UTF-8 is a name all the same.
                key = os.fsencode(path.relative_to(folder).as_posix()).decode(errors="backslashreplace")
                yield Item(key, partial(_text_of, path) if naming.kind == "texts" else partial(Path, path))


def _tar_items(path: Path, naming: Naming) -> Iterator[Item]:
    """Members that share a key stand together, as in every WebDataset; the last ones count once the end was seen."""
    with path.open("rb") as stream:
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
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise InputError(f"shard {path} was cut while it was read", fix="start again")
    return data if kind == "images" else _decoded(data)


def _parquet_items(path: Path, naming: Naming) -> Iterator[Item]:
    parquet = parquet_module(path)
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            have, wanted = file.schema_arrow.names, [naming.key, naming.column]
            if lost := [name for name in wanted if name not in have]:
                raise InputError(
                    f"{path} has no column {lost[0]!r}; it has {', '.join(have)}", fix="name it: --key and --column"
                )
            number = 0
            for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield _row_item(row, naming, path, f"{path} row {number}")
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # pyarrow's own are kinds of these
        raise DataError(f"table {path} cannot be read: {error}", fix="check the file") from error


def _json_items(path: Path, naming: Naming) -> Iterator[Item]:
    for where, row in JsonLines(path).scan(()):
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
        return value if naming.kind == "texts" else path_below(folder, value, where)
    if isinstance(value, bytes) and naming.kind == "images":
        return value
    raise DataError(f"{naming.column!r} is a {type(value).__name__}", fix="images are bytes or paths, texts are texts")


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_TEXT:
            raise DataError(f"it has {path.stat().st_size} bytes", fix=f"keep texts below {_LARGEST_TEXT} bytes")
        return _decoded(path.read_bytes())
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}", fix="check the file") from error


def _decoded(data: bytes) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8: {error}", fix="write it as UTF-8") from error
