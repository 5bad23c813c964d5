"""Quadruples of WebDataset shards: tar files whose members share a key. Only names and places are kept, never content."""

from __future__ import annotations

import glob
import os
import tarfile
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uwm_deploy.data.archive import expanded, key_and_ending, members
from uwm_deploy.data.files import SIDES, Entry, FileSource, Images, Texts, index_of
from uwm_deploy.data.finding import matching
from uwm_deploy.errors import DataError, InputError, unreadable
from uwm_deploy.recipes.data_set import CalibrationSet
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.runtime.image import MAX_BYTES

_IMAGES = ("jpg", "jpeg", "png", "webp")
_ROLES = {f"{side}.{kind}": place for place, side in enumerate(SIDES) for kind in _IMAGES}
_ROLES |= {"safe.txt": 2, "unsafe.txt": 3, "json": 4}
"""Ending of a member to its place in an item's row of the index."""

_JSON = 4
_PLACES = 5
_LARGEST_TEXT = 1 << 20
_MOST_OPEN = 32


def open_shards(spec: CalibrationSet, folder: Path, base: Path | None) -> FileSource:
    """Opens a set of shards.

    Args:
        spec: The set.
        folder: Where its shards are.
        base: Folder of its TOML file.

    Raises:
        DataError: If a shard is missing or broken, or an item's description is not JSON.
    """
    names = (spec.shards,) if isinstance(spec.shards, str) else spec.shards
    shards = _Shards([path for name in names for path in _paths(name, folder, spec.name)])
    return FileSource(spec, index_of(spec, shards.entries(), strict=False), shards, base)


def _paths(name: str, folder: Path, where: str) -> list[Path]:
    """Files that a name with brace ranges or wildcards stands for."""
    paths: list[Path] = []
    for text in expanded(name):
        if not glob.has_magic(text):
            paths.append(folder / text)
            continue
        found = matching(text, folder)
        if not found:
            raise DataError(f"data set {where}: no shard matches {folder / text}", fix="check `shards` and `folder`")
        paths += found
    return paths


class _Shards:
    """Place of every member in its shard.

    Args:
        paths: The shards, in order.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._descriptors: dict[int, int] = {}
        self._shard_of = array("i")
        self._places = array("q")  # _PLACES pairs of offset and size per item; offset -1 where there is no member
        weakref.finalize(self, _close, self._descriptors)

    def entries(self) -> Iterator[Entry]:
        """One entry per key; the shards' headers are read as it goes on."""
        for number, path in enumerate(self._paths):
            keys = self._index(number, path)
            first = len(self._shard_of) - len(keys)
            for row, key in enumerate(keys, first):
                yield self._entry(row, key, f"{path.name} key {key!r}")

    def texts(self, row: int) -> Texts:
        """See `files.Members`; a text file comes before the description."""
        described = self._description(row, self._paths[self._shard_of[row]].name)
        safe, unsafe = (self._text(row, 2 + i, described.get(f"{side}_text")) for i, side in enumerate(SIDES))
        return safe, unsafe

    def images(self, row: int) -> Images:
        """See `files.Members`."""
        return self._bytes(row, 0, MAX_BYTES), self._bytes(row, 1, MAX_BYTES)

    def _index(self, number: int, path: Path) -> list[str]:
        """Adds a shard's items; returns their keys."""
        rows: dict[str, int] = {}
        for key, role, member in _members(path):
            if key not in rows:
                rows[key] = len(self._shard_of)
                self._shard_of.append(number)
                self._places.extend([-1, 0] * _PLACES)
            place = 2 * (rows[key] * _PLACES + role)
            if self._places[place] >= 0:
                raise DataError(f"shard {path}: key {key!r} has two of {member.name!r}", fix="give every item its key")
            self._places[place], self._places[place + 1] = member.offset_data, member.size
        return list(rows)

    def _entry(self, row: int, key: str, where: str) -> Entry:
        described = self._description(row, where)
        concept = described.get("concept", "all")
        if not isinstance(concept, str):
            raise DataError(f"{where}: concept is {str(concept)[:40]!r}", fix="use a text")
        safe_text, unsafe_text = (
            self._has(row, 2 + i) or isinstance(described.get(f"{side}_text"), str) for i, side in enumerate(SIDES)
        )
        return Entry(
            where=where,
            id=key,
            concept=concept,
            texts=(safe_text, unsafe_text),
            images=(self._has(row, 0), self._has(row, 1)),
        )

    def _has(self, row: int, role: int) -> bool:
        return self._places[2 * (row * _PLACES + role)] >= 0

    def _description(self, row: int, where: str) -> dict[str, Any]:
        data = self._bytes(row, _JSON, _LARGEST_TEXT)
        if data is None:
            return {}
        try:
            body = value_from_json(data)
        except ValueError as error:
            raise DataError(f"{where}: .json is not JSON: {error}", fix="write one object per item") from error
        if not isinstance(body, dict):
            raise DataError(f"{where}: .json is not an object", fix="write one object per item")
        return body

    def _text(self, row: int, role: int, described: Any) -> str | None:
        data = self._bytes(row, role, _LARGEST_TEXT)
        if data is None:
            return described if isinstance(described, str) else None
        try:
            return data.decode().strip()
        except UnicodeDecodeError as error:
            raise DataError(f"caption is not UTF-8: {error}", fix="write it as UTF-8") from error

    def _bytes(self, row: int, role: int, most: int) -> bytes | None:
        place = 2 * (row * _PLACES + role)
        offset, size = self._places[place], self._places[place + 1]
        if offset < 0:
            return None
        path = self._paths[self._shard_of[row]]
        if size > most:
            raise DataError(f"{path.name}: a member has {size} bytes", fix=f"keep members below {most} bytes")
        try:
            data = os.pread(self._descriptor(self._shard_of[row], path), size, offset)
        except (OSError, MemoryError) as error:
            raise unreadable(f"shard {path}", error, fix="check the file") from error
        if len(data) != size:  # which is no fact about the item
            raise InputError(f"shard {path} was cut while it was read", fix="start again")
        return data

    def _descriptor(self, number: int, path: Path) -> int:
        """Of an open shard; few are open at a time."""
        if number not in self._descriptors:
            if len(self._descriptors) >= _MOST_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[number] = os.open(path, os.O_RDONLY)
        return self._descriptors[number]


def _close(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _members(path: Path) -> Iterator[tuple[str, int, tarfile.TarInfo]]:
    """Key, role and header of every member that belongs to a quadruple; of the rest nothing is read."""
    for member in members(path):
        key, ending = key_and_ending(member.name)
        role = _ROLES.get(ending) if key else None
        if role is None:
            continue
        if not member.isreg() or member.issparse():
            raise DataError(f"shard {path}: {member.name!r} is no plain file", fix="store plain files")
        yield key, role, member
