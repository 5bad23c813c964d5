"""Stored embeddings in one .npy file, read and written a piece at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from uwm_deploy.errors import DataError, InputError, unreadable
from uwm_deploy.records.files import locked, write_atomic
from uwm_deploy.records.machine import disk_errors
from uwm_deploy.runtime.embedding_map import Mapper
from uwm_deploy.serve.embed.stored import (
    Keys,
    Known,
    Knows,
    Label,
    Moved,
    Progress,
    bad_row,
    beside,
    is_finished,
    said_beside,
    source_of,
    tower_beside,
)

PART_BYTES = 256 << 20
"""Of rows that are durable before the next ones are made; a killed run loses at most these."""

_STATE = "state.json"
_ROWS = "rows.npy"


class NpyFile:
    """(n, d) float32 or float16; see `Stored`.

    Nothing but the rows at hand is in memory: a mapping of the whole file would count as such.

    Args:
        path: The file.
        keys: File with one key per line.

    Raises:
        DataError: If it holds something else.
    """

    def __init__(self, path: Path, keys: Path | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"{path} is no file", fix="check the path")
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # the library reads the header as Python, and raises whatever that raises
            raise unreadable(str(path), error, fix="save it with numpy.save") from error
        if not isinstance(found, np.memmap) or found.ndim != 2 or found.dtype not in (np.float32, np.float16):
            raise DataError(f"{path} does not hold (n, d) numbers in float32 or float16", fix="save such an array")
        if not found.size:
            raise DataError(f"{path} holds no numbers", fix="save at least one row")
        if not found.flags.c_contiguous:
            raise DataError(f"{path} lies in columns", fix="save numpy.ascontiguousarray of it")
        self.rows, self.dim = found.shape
        self._dtype, self._offset = found.dtype, int(found.offset)
        said = said_beside(path)
        self.tower, self.space = tower_beside(path, said), str(said.get("space", ""))
        self._keys = Keys(path, self.rows, keys, said.get("names"))
        self._said = said
        self.keyed = self._keys.there

    def known(self, knows: Knows) -> Iterator[Known]:
        """Items whose key is wanted; see `Stored.known`.

        Args:
            knows: Whether a key is wanted.

        Yields:
            Key and embedding, (d,) float32 or float16, of each wanted item that has an embedding.
        """
        for place, key in self._keys.places(knows):
            yield key, np.array(self._some(place, place + 1)[0])

    def migrate(self, out: Path, mapper: Mapper, label: Label, progress: Progress) -> Moved:
        """See `Stored.migrate`; until it is whole it lies in a folder beside `out`, with .migrating at its end."""
        made = label.plain() | {"rows": self.rows, "source": source_of(self.path)}
        work = out.with_name(f"{out.name}.migrating")
        if is_finished(out, made):
            if work.is_dir():  # of a run that was killed while it cleaned up
                with locked(work):
                    shutil.rmtree(work)
            return Moved(finished_before=self.rows)
        with locked(work), disk_errors(out):
            moved = self._continued(work, mapper, made, progress)
            names = {"names": self._said["names"]} if "names" in self._said else {}
            write_atomic(beside(out), json.dumps(made | names, indent=1))
            (work / _ROWS).replace(out)
            shutil.rmtree(work)
        return moved

    def _continued(self, work: Path, mapper: Mapper, made: dict[str, Any], progress: Progress) -> Moved:
        """All rows, from where the last run was."""
        moved = Moved(finished_before=self._begun(work, made))
        row_bytes = self.dim * self._dtype.itemsize
        part, done = max(1, PART_BYTES // row_bytes), moved.finished_before
        buffer = np.empty((mapper.chunk, self.dim), dtype=self._dtype)
        with (work / _ROWS).open("r+b") as stream:
            stream.seek(_header_bytes(work) + done * row_bytes)
            stream.truncate()
            while done < self.rows:
                end = min(done + part, self.rows)
                for start in range(done, end, mapper.chunk):
                    self._write(stream, start, min(start + mapper.chunk, end), mapper, buffer)
                    progress("rows", start, self.rows)
                stream.flush()
                os.fsync(stream.fileno())
                moved.rows, moved.parts, done = moved.rows + end - done, moved.parts + 1, end
                write_atomic(work / _STATE, json.dumps({"made": made, "done": done}))
        return moved

    def _write(self, stream: IO[bytes], start: int, end: int, mapper: Mapper, buffer: np.ndarray) -> None:
        rows, into = self._some(start, end), buffer[: end - start]
        if (bad := mapper(rows, into)) is not None:
            raise bad_row(self.path, start + bad, self._keys.at(start + bad), rows[bad])
        stream.write(into.data)

    def _begun(self, work: Path, made: dict[str, Any]) -> int:
        """Rows that are there; starts the file if there are none."""
        if (work / _STATE).exists():
            state = json.loads((work / _STATE).read_text(encoding="utf-8"))
            if state["made"] != made:
                raise InputError(f"{work} is of another job", fix="remove it or choose another --out")
            return int(state["done"])
        with (work / _ROWS).open("wb") as stream:
            head = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.rows, self.dim)}
            np.lib.format.write_array_header_1_0(stream, head)
        return 0

    def _some(self, start: int, end: int) -> np.ndarray:
        """Rows, mapped for as long as they are looked at."""
        offset = self._offset + start * self.dim * self._dtype.itemsize
        return np.memmap(self.path, self._dtype, "r", offset=offset, shape=(end - start, self.dim))


def _header_bytes(work: Path) -> int:
    with (work / _ROWS).open("rb") as stream:
        np.lib.format.read_magic(stream)
        np.lib.format.read_array_header_1_0(stream)
        return stream.tell()
