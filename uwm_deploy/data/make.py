"""Writes a manifest from folders: FOLDER/CONCEPT/{safe,unsafe}/NAME.{jpg,txt,...}."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from uwm_deploy.data.files import NAMED_LEFT_OUT, SIDES
from uwm_deploy.data.finding import is_file, is_folder, names_in
from uwm_deploy.data.parquet import parquet_module
from uwm_deploy.data.table import JSON_LINES, PARQUET, is_manifest
from uwm_deploy.errors import DataError, InputError, unreadable
from uwm_deploy.records.data import LeftOut, MadeManifest
from uwm_deploy.records.files import whole_file
from uwm_deploy.runtime.image import MAX_BYTES

_KINDS = {".txt": "text"} | dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "image")
"""Endings of files to what they hold."""

_LARGEST_CAPTION = 1 << 20
_NAMED_IN_A_LINE = 3
_ROWS = 4096
_ROWS_WITH_IMAGES = 64
"""Rows of a row group: as many are in memory at a time, here and when they are read."""

_COLUMNS = ("id", "concept", "safe_image", "unsafe_image", "safe_text", "unsafe_text")

Row = dict[str, Any]


def make_manifest(
    folder: Path, out: Path, *, embed: bool = False, drop_unpaired: bool = False, force: bool = False
) -> MadeManifest:
    """Writes the manifest of a folder, whole or not at all.

    Args:
        folder: Holds a folder per concept, each with ``safe/`` and ``unsafe/``; or these two, for one concept.
        out: JSON Lines or Parquet, by its ending. Image paths in it start from its own folder.
        embed: Put the images into the Parquet file.
        drop_unpaired: Leave out items without a counterpart, instead of refusing them.
        force: Replace `out`.

    Raises:
        InputError: If `out` is there, or cannot be what it should be.
        DataError: If the folder has another layout, or a caption cannot be read.
        PrerequisiteError: If pyarrow is missing, or the disk is full.
    """
    parquet = out.suffix.lower() in PARQUET
    if not is_manifest(out.name):
        raise InputError(f"{out} is no manifest's name", fix=f"end it in {', '.join((*JSON_LINES, *PARQUET))}")
    if embed and not parquet:
        raise InputError("only Parquet holds images", fix="end --out in .parquet, or leave --embed out")
    if not is_folder(folder):
        raise InputError(f"{folder} is no folder", fix="check the path")
    if out.is_dir() or (out.exists() and not force):
        raise InputError(f"{out} is there already", fix="pass --force to replace a file, or choose another --out")
    walk = _Walk(folder, prefix=None if embed else _prefix(folder, out))
    with whole_file(out) as stream:
        if parquet:
            _write_parquet(walk.rows(), stream, out, images=embed)
        else:
            stream.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in walk.rows())
        if walk.unpaired_count and not drop_unpaired:
            first = ", ".join(f"{item.id}: {item.reason}" for item in walk.unpaired[:_NAMED_IN_A_LINE])
            raise DataError(
                f"items of {folder} without a counterpart: {walk.unpaired_count} ({first})",
                fix="add it, or pass --drop-unpaired to leave them out",
            )
        if not walk.concepts:
            raise DataError(
                f"{folder} has no pair of files with one name in safe/ and unsafe/", fix="see docs/reference/data.md"
            )
    return MadeManifest(
        n=walk.concepts.total(),
        concepts=dict(sorted(walk.concepts.items())),
        image_pairs=walk.pairs["image"],
        text_pairs=walk.pairs["text"],
        unpaired_count=walk.unpaired_count,
        unpaired=tuple(walk.unpaired),
        ignored_count=walk.ignored_count,
        ignored=tuple(walk.ignored),
    )


def _prefix(folder: Path, out: Path) -> str:
    """Path of the folder as the manifest's rows give it; a manifest names nothing outside its own folder."""
    path = os.path.relpath(folder, out.parent)
    if path.split(os.sep)[0] == os.pardir:
        raise InputError(
            f"{out} would have to name images above its own folder",
            fix=f"write it into {folder} or a folder above it, or pass --embed with a Parquet file",
        )
    return "" if path == os.curdir else Path(path).as_posix() + "/"


@dataclass(slots=True)
class _Walk:
    """Goes through a folder in the order of names, one concept at a time, and counts.

    Attributes:
        folder: Of all concepts.
        prefix: What image paths begin with; None takes the images themselves.
    """

    folder: Path
    prefix: str | None
    concepts: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    unpaired: list[LeftOut] = field(default_factory=list)
    unpaired_count: int = 0
    ignored: list[str] = field(default_factory=list)
    ignored_count: int = 0

    def rows(self) -> Iterator[Row]:
        """Rows of the manifest."""
        names = self._names(self.folder)
        if set(names) & set(SIDES):
            self._ignore(self.folder, [name for name in names if name not in SIDES])
            yield from self._items("all", self.folder, "")
            return
        for name in names:
            if is_folder(self.folder / name):
                yield from self._items(name, self.folder / name, f"{name}/")
            else:
                self._ignore(self.folder, [name])

    def _items(self, concept: str, folder: Path, prefix: str) -> Iterator[Row]:
        names = self._names(folder)
        if not set(names) & set(SIDES):
            raise DataError(f"{folder} has neither safe/ nor unsafe/", fix="see docs/reference/data.md for the layout")
        self._ignore(folder, [name for name in names if name not in SIDES])
        safe, unsafe = (self._files(folder / side) if side in names else {} for side in SIDES)
        for stem in sorted({*safe, *unsafe}):
            item = f"{prefix}{stem}"
            kinds = [set(side.get(stem, {})) for side in (safe, unsafe)]
            if kinds[0] != kinds[1]:
                self._leave_out(item, *kinds)
                continue
            row: Row = {"id": item, "concept": concept}
            for side, files in zip(SIDES, (safe[stem], unsafe[stem]), strict=True):
                for kind, name in files.items():
                    row[f"{side}_{kind}"] = self._member(kind, folder / side / name, f"{prefix}{side}/{name}")
            self.concepts[concept] += 1
            self.pairs.update(kinds[0])
            yield row

    def _files(self, folder: Path) -> dict[str, dict[str, str]]:
        """Files by stem and kind, ``image`` or ``text``."""
        found: dict[str, dict[str, str]] = {}
        for name in self._names(folder):
            path = folder / name
            kind = _KINDS.get(path.suffix.lower())
            if kind is None or not is_file(path):
                self._ignore(folder, [name])
                continue
            other = found.setdefault(path.stem, {}).setdefault(kind, name)
            if other != name:
                raise DataError(f"{folder} has both {other} and {name}", fix="give every item its own name")
        return found

    def _names(self, folder: Path) -> list[str]:
        """What is in a folder, hidden files apart."""
        names = [name for name in names_in(folder) if not name.startswith(".")]
        for name in names:
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{folder} has the name {name!r}, which is not UTF-8", fix="rename it") from error
        return names

    def _member(self, kind: str, path: Path, below: str) -> str | bytes:
        if kind == "text":
            return _caption(path)
        return f"{self.prefix}{below}" if self.prefix is not None else _bytes(path, MAX_BYTES)

    def _ignore(self, folder: Path, names: list[str]) -> None:
        self.ignored_count += len(names)
        self.ignored += [(folder / name).relative_to(self.folder).as_posix() for name in names]
        del self.ignored[NAMED_LEFT_OUT:]

    def _leave_out(self, item: str, safe: set[str], unsafe: set[str]) -> None:
        self.unpaired_count += 1
        if len(self.unpaired) < NAMED_LEFT_OUT:
            missing = [f"unsafe {kind}" for kind in sorted(safe - unsafe)]
            missing += [f"safe {kind}" for kind in sorted(unsafe - safe)]
            self.unpaired.append(LeftOut(id=item, reason=f"no {' and no '.join(missing)}"))


def _caption(path: Path) -> str:
    try:
        text = _bytes(path, _LARGEST_CAPTION).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason}", fix="write captions as UTF-8") from error
    if not text:
        raise DataError(f"{path} is empty", fix="write a caption, or remove the item")
    return text


def _bytes(path: Path, most: int) -> bytes:
    try:
        if path.stat().st_size > most:
            raise DataError(f"{path} has more than {most} bytes", fix="make it smaller")
        return path.read_bytes()
    except OSError as error:
        raise unreadable(str(path), error, fix="check the file") from error


def _write_parquet(rows: Iterator[Row], stream: IO[bytes], out: Path, *, images: bool) -> None:
    parquet = parquet_module(out)
    import pyarrow  # type: ignore[import-untyped]  # it has no annotations

    image = pyarrow.binary() if images else pyarrow.string()
    schema = pyarrow.schema([(name, image if name.endswith("_image") else pyarrow.string()) for name in _COLUMNS])
    with parquet.ParquetWriter(stream, schema, use_dictionary=["concept"]) as writer:
        while some := list(itertools.islice(rows, _ROWS_WITH_IMAGES if images else _ROWS)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))
