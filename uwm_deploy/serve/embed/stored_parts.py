"""Stored embeddings in the Parquet parts of `embed`: a part in, a part of the same name out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uwm_deploy.data.parquet import parquet_module
from uwm_deploy.errors import DataError, EvidenceError, InputError
from uwm_deploy.records.files import locked, whole_file
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.embedding_map import Mapper
from uwm_deploy.serve.embed.parts import (
    KEYS_AT_A_TIME,
    METADATA,
    SAME,
    WRITING,
    check_identity,
    opened,
    parts_of,
    said_by,
)
from uwm_deploy.serve.embed.stored import Known, Knows, Label, Moved, Progress, bad_row, source_of

_TOWERS = {"images": TowerName.IMAGE, "texts": TowerName.TEXT}


@dataclass(frozen=True, slots=True)
class _Part:
    """One part: its file, its rows, and what it says of itself."""

    path: Path
    rows: int
    said: dict[str, Any]


class PartsFolder:
    """See `Stored`.

    Args:
        path: The folder.

    Raises:
        InputError: If it has no parts, or others than those of `embed`.
        EvidenceError: If they are of several spaces.
        PrerequisiteError: If pyarrow is not installed.
    """

    keyed = True

    def __init__(self, path: Path) -> None:
        self.path, self._parquet = path, parquet_module(path)
        self._parts = [_part(one) for one in parts_of(path)]
        if not self._parts:
            raise InputError(f"{path} has no Parquet parts", fix="pass the folder that `embed` wrote")
        first = self._parts[0]
        self.dim, self.rows = self._dim(first.path), sum(part.rows for part in self._parts)
        self.tower, self.space = _TOWERS.get(str(first.said.get("kind"))), str(first.said.get("space", ""))
        for part in self._parts:
            if part.said.get("space") != self.space:
                raise EvidenceError(
                    f"{path} holds embeddings of {self.space} and of {part.said.get('space')}", fix="take them apart"
                )
            check_identity(part.path, part.said, {name: first.said.get(name) for name in ("kind", "dtype")})

    def known(self, knows: Knows) -> Iterator[Known]:
        """Items whose key is wanted; see `Stored.known`.

        Args:
            knows: Whether a key is wanted.

        Yields:
            Key and embedding, (d,) float32 or float16, of each wanted item that has an embedding.
        """
        for part in self._parts:
            with opened(part.path) as file:
                keys = [
                    key for some in file.iter_batches(KEYS_AT_A_TIME, columns=["key"]) for key in some[0].to_pylist()
                ]
            places = {place: key for place, key in enumerate(keys) if knows(key)}
            if places:
                yield from self._taken(part, places)

    def _taken(self, part: _Part, places: dict[int, str]) -> Iterator[Known]:
        start = 0
        with opened(part.path) as file:
            for some in file.iter_batches(KEYS_AT_A_TIME, columns=["embedding", "error"]):
                rows, failed = _embeddings(some, self.dim), _failed(some)
                for place in range(len(rows)):
                    if start + place in places and not failed[place]:
                        yield places[start + place], rows[place]
                start += len(rows)

    def migrate(self, out: Path, mapper: Mapper, label: Label, progress: Progress) -> Moved:
        """See `Stored.migrate`; parts that are there already are left as they are."""
        _check_folder(out)
        moved = Moved()
        with locked(out):
            there = self._there(out, label)
            for part in self._parts:
                if part.path.name in there:
                    moved.finished_before += part.rows
                else:
                    moved.errors += self._moved(part, out / part.path.name, mapper, label)
                    moved.rows, moved.parts = moved.rows + part.rows, moved.parts + 1
                progress("rows", moved.rows + moved.finished_before, self.rows)
        return moved

    def _there(self, out: Path, label: Label) -> set[str]:
        """Names of the parts that an earlier run made; `embed` may have gone on beside them."""
        ours = {part.path.name: part for part in self._parts}
        found = set()
        for path in parts_of(out):
            there, same = _part(path), {**_identity(self._parts[0].said, label)}
            part = ours.get(path.name)
            if part is not None:
                same |= {"migrated_from": label.migrated_from, "source": source_of(part.path)}
                found.add(path.name)
            check_identity(path, there.said, same)
            if part is not None and part.rows != there.rows:
                raise InputError(f"{path} has {there.rows} rows, not {part.rows}", fix="choose another --out")
        return found

    def _moved(self, part: _Part, path: Path, mapper: Mapper, label: Label) -> int:
        """Writes one part; the number of its rows that stay as they are."""
        said = part.said | _identity(part.said, label)
        said |= {"migrated_from": label.migrated_from, "source": source_of(part.path)}
        errors, done = 0, 0
        with opened(part.path) as file, whole_file(path) as stream:
            schema = file.schema_arrow.with_metadata({**file.schema_arrow.metadata, METADATA: json.dumps(said)})
            with self._parquet.ParquetWriter(stream, schema, **WRITING) as writer:
                for some in file.iter_batches(mapper.chunk):
                    rows, failed = _embeddings(some, self.dim), _failed(some)
                    made = np.empty_like(rows)
                    if (bad := mapper(rows, made, failed)) is not None:
                        raise bad_row(part.path, done + bad, str(some["key"][bad]), rows[bad])
                    writer.write_batch(_with(some, schema, made, label))
                    errors, done = errors + int(failed.sum()), done + len(rows)
        return errors

    def _dim(self, path: Path) -> int:
        with opened(path) as file:
            kind = file.schema_arrow.field("embedding").type
            if not hasattr(kind, "list_size") or str(kind.value_type) not in ("float", "halffloat"):
                raise DataError(f"{path} has embeddings of type {kind}", fix="embed the items again")
            return int(kind.list_size)


def _identity(said: dict[str, Any], label: Label) -> dict[str, Any]:
    """What `embed` with the bundle would ask of a part, so that it can go on in the folder."""
    same = {"bundle": label.bundle, "variant": label.variant, "space": label.space}
    return {"kind": said["kind"], "dtype": said["dtype"], **same}


def _part(path: Path) -> _Part:
    with opened(path) as file:
        return _Part(path, int(file.metadata.num_rows), said_by(path, file))


def _check_folder(out: Path) -> None:
    """Nothing is written among files of something else."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} exists and is no folder", fix="choose another --out")
    seen = [path for path in out.iterdir() if not path.name.startswith(".")] if out.exists() else []
    if seen and not parts_of(out):
        raise InputError(f"{out} exists and is something else: it has {seen[0].name}", fix="choose another --out")


def _embeddings(some: Any, dim: int) -> np.ndarray:
    """(n, d) of a batch of rows, in the element type that they have."""
    rows: np.ndarray = some["embedding"].flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    if len(rows) != some.num_rows:
        raise DataError("a row has no embedding, not even NaN", fix="embed the items again")
    return rows


def _failed(some: Any) -> np.ndarray:
    """(n,) bool: rows of items that have an error instead of an embedding."""
    return np.array([bool(error) for error in some["error"].to_pylist()], dtype=bool)


def _with(some: Any, schema: Any, rows: np.ndarray, label: Label) -> Any:
    """A batch with other embeddings and labels; its other columns are as they were."""
    import pyarrow as pa  # type: ignore[import-untyped]  # it has no annotations

    same = label.plain()
    columns = {name: some[name] for name in schema.names}
    columns |= {name: pa.array([same[name]] * len(rows), pa.string()) for name in SAME}
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    arrays = [columns[name].cast(schema.field(name).type) for name in schema.names]
    return pa.record_batch(arrays, schema=schema)
