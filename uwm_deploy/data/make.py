"""Writes a manifest, from folders: FOLDER/CONCEPT/{safe,unsafe}/NAME.{jpg,txt,...}; or from a set of another form."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

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

_LAYOUT = "see docs/reference/data.md for the layout"
_LARGEST_CAPTION = 1 << 20
_NAMED_IN_A_LINE = 3
_ROWS = 4096
_ROWS_WITH_IMAGES = 64
"""Rows of a row group: as many are in memory at a time, here and when they are read."""

_COLUMNS = ("id", "concept", "safe_image", "unsafe_image", "safe_text", "unsafe_text")

Row = dict[str, Any]


class Gathered(Protocol):
    """Items on their way into a manifest; what it counts is complete once `rows` has run through."""

    concepts: Counter[str]
    pairs: Counter[str]
    unpaired: list[LeftOut]
    unpaired_count: int
    ignored: list[str]
    ignored_count: int

    def rows(self) -> Iterator[Row]:
        """Rows of the manifest."""


def make_manifest(
    folder: Path,
    out: Path,
    *,
    unsafe: Path | None = None,
    embed: bool = False,
    drop_unpaired: bool = False,
    force: bool = False,
) -> MadeManifest:
    """Writes the manifest of folders, whole or not at all.

    Args:
        folder: Holds a folder per concept, each with ``safe/`` and ``unsafe/``; or these two, for one concept; or the safe
            files themselves, where `unsafe` is given.
        out: JSON Lines or Parquet, by its ending. Image paths in it start from its own folder.
        unsafe: Folder with the unsafe files.
        embed: Put the images into the Parquet file.
        drop_unpaired: Leave out items without a counterpart, instead of refusing them.
        force: Replace `out`.

    Raises:
        InputError: If `out` is there, or cannot be what it should be.
        DataError: If the folder has another layout, or a caption cannot be read.
        PrerequisiteError: If pyarrow is missing, or the disk is full.
    """
    check_place(out, embed=embed, force=force)
    for one in filter(None, (folder, unsafe)):
        if not is_folder(one):
            raise InputError(f"{one} is no folder", fix="check the path")
        if not embed:
            refuse_outside(one, out)
    walk = _Walk(folder, unsafe, home=None if embed else out.parent)
    return write_manifest(walk, folder, out, nothing=_no_pair(folder, unsafe), embed=embed, drop_unpaired=drop_unpaired)


def _no_pair(folder: Path, unsafe: Path | None) -> DataError:
    if unsafe is not None:
        return DataError(f"{folder} and {unsafe} have no pair of files with one name", fix=_LAYOUT)
    return DataError(
        f"{folder} has no pair of files with one name in safe/ and unsafe/",
        fix=f"pass --unsafe FOLDER if {folder} holds the safe files alone; {_LAYOUT}",
    )


def check_place(out: Path, *, embed: bool, force: bool) -> None:
    """Checks that a manifest can go where it is asked for.

    Raises:
        InputError: If it cannot.
    """
    if not is_manifest(out.name):
        raise InputError(f"{out} is no manifest's name", fix=f"end it in {', '.join((*JSON_LINES, *PARQUET))}")
    if embed and out.suffix.lower() not in PARQUET:
        raise InputError("only Parquet holds images", fix="end --out in .parquet, or leave --embed out")
    if out.is_dir() or (out.exists() and not force):
        raise InputError(f"{out} is there already", fix="pass --force to replace a file, or choose another --out")


def write_manifest(
    gathered: Gathered, source: Path, out: Path, *, nothing: DataError, embed: bool, drop_unpaired: bool
) -> MadeManifest:
    """Writes what was gathered, whole or not at all.

    Args:
        gathered: The items.
        source: Where they are from, for messages.
        out: JSON Lines or Parquet, by its ending.
        nothing: What is raised where there is no item.
        embed: The rows hold images, not paths.
        drop_unpaired: Leave out items without a counterpart, instead of refusing them.

    Raises:
        DataError: If an item has no counterpart, or there is no item.
        PrerequisiteError: If pyarrow is missing, or the disk is full.
    """
    with whole_file(out) as stream:
        if out.suffix.lower() in PARQUET:
            _write_parquet(gathered.rows(), stream, out, images=embed)
        else:
            stream.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in gathered.rows())
        if gathered.unpaired_count and not drop_unpaired:
            first = ", ".join(f"{item.id}: {item.reason}" for item in gathered.unpaired[:_NAMED_IN_A_LINE])
            raise DataError(
                f"items of {source} without a counterpart: {gathered.unpaired_count} ({first})",
                fix="add it, or pass --drop-unpaired to leave them out",
            )
        if not gathered.concepts:
            raise nothing
    return MadeManifest(
        n=gathered.concepts.total(),
        concepts=dict(sorted(gathered.concepts.items())),
        image_pairs=gathered.pairs["image"],
        text_pairs=gathered.pairs["text"],
        unpaired_count=gathered.unpaired_count,
        unpaired=tuple(gathered.unpaired),
        ignored_count=gathered.ignored_count,
        ignored=tuple(gathered.ignored),
    )


def refuse_outside(path: Path, out: Path) -> None:
    """A manifest names nothing outside its own folder.

    Args:
        path: An image, or the folder of images.
        out: The manifest.

    Raises:
        InputError: If the manifest would have to.
    """
    if os.path.relpath(path, out.parent).split(os.sep)[0] == os.pardir:
        raise InputError(
            f"{out} would have to name images above its own folder",
            fix=f"write it into {path} or a folder above it, or pass --embed with a Parquet file",
        )


def relative_path(path: Path, home: Path) -> str:
    """Path of an image as a manifest in `home` gives it."""
    return Path(os.path.relpath(path, home)).as_posix()


def unpaired_reason(safe: Collection[str], unsafe: Collection[str]) -> str:
    """What an item lacks.

    Args:
        safe: Kinds of its safe members, ``image`` or ``text``.
        unsafe: Of its unsafe ones.
    """
    missing = [f"unsafe {kind}" for kind in sorted(set(safe) - set(unsafe))]
    missing += [f"safe {kind}" for kind in sorted(set(unsafe) - set(safe))]
    return f"no {' and no '.join(missing)}"


@dataclass(slots=True)
class _Walk:
    """Goes through a folder in the order of names, one concept at a time, and counts.

    Attributes:
        folder: Of all concepts; of the safe files where `unsafe` is given.
        unsafe: Of the unsafe files.
        home: Folder that image paths start from; None takes the images themselves.
    """

    folder: Path
    unsafe: Path | None
    home: Path | None
    concepts: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    unpaired: list[LeftOut] = field(default_factory=list)
    unpaired_count: int = 0
    ignored: list[str] = field(default_factory=list)
    ignored_count: int = 0

    def rows(self) -> Iterator[Row]:
        """Rows of the manifest."""
        if self.unsafe is not None:
            yield from self._items("all", (self.folder, self.unsafe), "")
            return
        names = self._names(self.folder)
        if set(names) & set(SIDES):
            yield from self._items("all", self._sides(self.folder), "")
            return
        for name in names:
            if is_folder(self.folder / name):
                yield from self._items(name, self._sides(self.folder / name), f"{name}/")
            else:
                self._ignore(self.folder, [name])

    def _sides(self, folder: Path) -> tuple[Path, Path]:
        """Folders of both sides in the folder of a concept."""
        names = self._names(folder)
        if not set(names) & set(SIDES):
            raise DataError(
                f"{folder} has neither safe/ nor unsafe/",
                fix=f"pass --unsafe FOLDER if {self.folder} holds the safe files alone; {_LAYOUT}",
            )
        self._ignore(folder, [name for name in names if name not in SIDES])
        return folder / SIDES[0], folder / SIDES[1]

    def _items(self, concept: str, folders: tuple[Path, Path], prefix: str) -> Iterator[Row]:
        safe, unsafe = (self._files(folder) if is_folder(folder) else {} for folder in folders)
        for stem in sorted({*safe, *unsafe}):
            item = f"{prefix}{stem}"
            kinds = [set(side.get(stem, {})) for side in (safe, unsafe)]
            if kinds[0] != kinds[1]:
                self._leave_out(item, *kinds)
                continue
            row: Row = {"id": item, "concept": concept}
            for side, folder, files in zip(SIDES, folders, (safe[stem], unsafe[stem]), strict=True):
                for kind, name in files.items():
                    row[f"{side}_{kind}"] = self._member(kind, folder / name)
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

    def _member(self, kind: str, path: Path) -> str | bytes:
        if kind == "text":
            return _caption(path)
        return relative_path(path, self.home) if self.home is not None else bytes_of(path)

    def _ignore(self, folder: Path, names: list[str]) -> None:
        self.ignored_count += len(names)
        self.ignored += [relative_path(folder / name, self.folder) for name in names]
        del self.ignored[NAMED_LEFT_OUT:]

    def _leave_out(self, item: str, safe: set[str], unsafe: set[str]) -> None:
        self.unpaired_count += 1
        if len(self.unpaired) < NAMED_LEFT_OUT:
            self.unpaired.append(LeftOut(id=item, reason=unpaired_reason(safe, unsafe)))


def _caption(path: Path) -> str:
    try:
        text = bytes_of(path, _LARGEST_CAPTION).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason}", fix="write captions as UTF-8") from error
    if not text:
        raise DataError(f"{path} is empty", fix="write a caption, or remove the item")
    return text


def bytes_of(path: Path, most: int = MAX_BYTES) -> bytes:
    """Content of a file.

    Args:
        path: The file.
        most: Largest number of bytes.

    Raises:
        DataError: If it is larger, or cannot be read.
    """
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
