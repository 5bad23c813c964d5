"""Embeddings that are stored already: what every kind of store can do, and what stands beside a file of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uwm_deploy.bundle.space import SpaceId
from uwm_deploy.errors import DataError, InputError, unreadable
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.runtime.embedding_map import Mapper

Known = tuple[str, np.ndarray]
"""Key of an item and its stored embedding, (d,) float32 or float16."""

Knows = Callable[[str], bool]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What migrated embeddings are, written wherever they lie.

    Attributes:
        space: Of the result.
        migrated_from: Space of what was stored.
        bundle: Digest of the manifest of the bundle with the map.
        variant: Whose space it is.
    """

    tower: TowerName
    space: SpaceId
    migrated_from: SpaceId
    bundle: Digest
    variant: str

    def plain(self) -> dict[str, str]:
        """For JSON."""
        return {
            "tower": self.tower.value,
            "space": self.space,
            "migrated_from": self.migrated_from,
            "bundle": self.bundle,
            "variant": self.variant,
        }


@dataclass(slots=True, kw_only=True)
class Moved:
    """What a run did.

    Attributes:
        rows: Migrated by this run, with those that stay as they are.
        errors: Rows of items without an embedding among them, which stay as they are.
        finished_before: Rows that earlier runs had migrated.
        parts: Pieces that this run wrote, each durable before the next.
    """

    rows: int = 0
    errors: int = 0
    finished_before: int = 0
    parts: int = 0


class Stored(Protocol):
    """One store of embeddings of one tower.

    Attributes:
        path: Where it is.
        rows: How many.
        dim: Numbers per embedding.
        tower: Which one, if the store says it.
        space: Id of their space; empty if the store does not say it.
        keyed: Whether the keys of the rows are known.
    """

    path: Path
    rows: int
    dim: int
    tower: TowerName | None
    space: SpaceId
    keyed: bool

    def known(self, knows: Knows) -> Iterator[Known]:
        """Items whose key is wanted.

        Args:
            knows: Whether a key is wanted.

        Yields:
            Key and embedding, (d,) float32 or float16, of each wanted item that has an embedding.

        Raises:
            InputError: If there are more or fewer keys than rows.
        """

    def migrate(self, out: Path, mapper: Mapper, label: Label, progress: Progress) -> Moved:
        """Writes a store of the same kind, or goes on with one.

        Raises:
            InputError: If `out` is something else.
            DataError: If a row is no embedding of length 1; the first one is named.
            PrerequisiteError: If the disk is full.
        """


def source_of(path: Path) -> dict[str, int]:
    """Enough of a file to tell that it is still the one that a run began with."""
    found = path.stat()
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def bad_row(where: Path, number: int, key: str, row: np.ndarray) -> DataError:
    """The error for a row that cannot be migrated.

    Args:
        where: File of the row.
        number: Place of the row in the file, from 0.
        key: Key of the row; empty where it is not known.
        row: (d,), any floating dtype.
    """
    length = float(np.linalg.norm(row.astype(np.float64)))
    what = f"has length {length:.4f}, not 1" if abs(length - 1) > 1e-4 else "has no direction after the map"
    if not np.isfinite(row).all():
        what = "is not finite"
    return DataError(
        f"{where} row {number} (from 0){f', key {key}' if key else ''}: its embedding {what}",
        fix="store embeddings of length 1, of every item",
    )


def beside(path: Path) -> Path:
    """File that says what the rows of a file are: the same name with .json at its end."""
    return path.with_suffix(".json")


def said_beside(path: Path) -> dict[str, Any]:
    """What stands beside a file; nothing if nothing does.

    Raises:
        DataError: If it cannot be read, or does not say it in the right form.
    """
    about = beside(path)
    if about == path or not about.is_file():
        return {}
    try:
        body = value_from_json(about.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(str(about), error, fix=f"it is to say what {path.name} is; mend it") from error
    if not isinstance(body, dict):  # a file of somebody's own
        return {}
    if not isinstance(body.get("space", ""), str):
        raise DataError(f'{about}: "space" is no id of a space', fix="write it as space:sha256:... or leave it out")
    return body


def tower_beside(path: Path, said: dict[str, Any]) -> TowerName | None:
    """Tower that stands beside a file.

    Raises:
        DataError: If there is no such tower.
    """
    if "tower" not in said:
        return None
    try:
        return TowerName(said["tower"])
    except ValueError as error:
        raise DataError(f"{beside(path)}: {error}", fix="it is image or text") from error


def is_finished(out: Path, made: dict[str, Any]) -> bool:
    """Whether a file that is to be made is there already.

    Args:
        out: The file.
        made: What would stand beside it.

    Raises:
        InputError: If something else is there.
    """
    said = said_beside(out)
    same = all(said.get(name) == value for name, value in made.items())
    if not out.exists():
        if beside(out).exists() and not same:
            raise InputError(f"{beside(out)} exists and is about something else", fix="choose another --out")
        return False
    if not same:
        raise InputError(f"{out} exists and is something else", fix="choose another --out, or remove it")
    return True


class KeyFile:
    """A text file with one key per line, read as it is needed.

    Args:
        path: UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[str]:
        try:
            with self.path.open(encoding="utf-8", newline="\n") as stream:
                for line in stream:
                    yield line.rstrip("\r\n")
        except (OSError, ValueError) as error:
            raise unreadable(str(self.path), error, fix="one key per line, in UTF-8") from error


class Keys:
    """Keys of the rows of a file, in their order: from a file, or from what stands beside it.

    Args:
        path: The file with the rows.
        rows: How many it has.
        keys: File with keys.
        named: Keys that are known without one.
    """

    def __init__(self, path: Path, rows: int, keys: Path | None, named: object) -> None:
        self._path, self._rows = path, rows
        self._keys: KeyFile | list[str] | None = KeyFile(keys) if keys else None
        if keys is None and isinstance(named, list):
            self._keys = [str(one) for one in named]

    @property
    def there(self) -> bool:
        """Whether any are known."""
        return self._keys is not None

    def places(self, knows: Knows) -> Iterator[tuple[int, str]]:
        """Rows whose key is known.

        Raises:
            InputError: If there are more or fewer keys than rows.
        """
        if self._keys is None:
            return
        found, count = [], 0
        for count, key in enumerate(self._keys, start=1):
            if knows(key):
                found.append((count - 1, key))
        if count != self._rows:
            raise InputError(f"there are {count} keys for the {self._rows} rows of {self._path}", fix="one per row")
        yield from found

    def at(self, place: int) -> str:
        """Key of one row, for a message; empty if it is not known."""
        return next((key for number, key in enumerate(self._keys or ()) if number == place), "")
