"""Rows of a Parquet file: a few rows at a time, so that images inside it never fill the memory."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uwm_deploy.data.rows import Row
from uwm_deploy.errors import DataError, imported

_SCAN_ROWS = 1024
_IMAGE_ROWS = 16
"""Rows decoded at a time when images are among the columns."""

_BUFFER_BYTES = 1 << 20
"""A column is read in pieces of this size; without it a whole row group's column would be."""

_ARROW_ERRORS = (OSError, ValueError, KeyError, RuntimeError)
"""What pyarrow's own errors are kinds of."""


def parquet_module(path: Path) -> Any:
    """`pyarrow.parquet`.

    Args:
        path: What it is needed for.

    Raises:
        PrerequisiteError: If it is not installed.
    """
    return imported("pyarrow.parquet", f"{path.name} needs pyarrow", fix="install it: pip install 'uwm-deploy[build]'")


class UnreadImage:
    """Stands for image bytes that a scan did not read."""


UNREAD_IMAGE = UnreadImage()


class ParquetRows:
    """Rows of one Parquet file.

    Args:
        path: The file.

    Raises:
        DataError: If it is broken.
        PrerequisiteError: If pyarrow is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = self._opened()
        metadata, schema = file.metadata, file.schema_arrow
        self.columns: tuple[str, ...] = tuple(schema.names)
        if len(set(self.columns)) != len(self.columns):
            raise DataError(f"table {path} names a column twice", fix="give every column its name")
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(sizes))
        types = _types()
        self._bytes = {f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)}
        self._structs = {f.name for f in schema if types.is_struct(f.type)}
        self._whole = {name for name in self._bytes | self._structs if _never_null(metadata, name)}
        self._cursors: dict[tuple[str, ...], _Cursor] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """See `rows.Rows`; image bytes are only announced, by `UNREAD_IMAGE`."""
        for name in columns:
            if name not in self.columns:
                raise missing_column(self.path.name, name, self.columns)
        announced = {name: UNREAD_IMAGE for name in columns if name in self._whole}
        read = [name for name in columns if name not in announced]
        number = 0
        for batch in self._batches(read):
            try:
                rows = {name: self._scanned(batch.column(name), name) for name in read}
            except _ARROW_ERRORS as error:
                raise self._broken(error) from error
            for position in range(batch.num_rows):
                number += 1
                row = {name: values[position] for name, values in rows.items()}
                yield f"{self.path.name} row {number}", {**row, **announced}

    def get(self, index: int, columns: tuple[str, ...]) -> Row:
        """See `rows.Rows`; fast in ascending order."""
        if self._process != os.getpid():  # a forked process must not share the file's position with its parent
            self._cursors, self._process = {}, os.getpid()
        if columns not in self._cursors:
            rows = _IMAGE_ROWS if set(columns) & (self._bytes | self._structs) else _SCAN_ROWS
            self._cursors[columns] = _Cursor(self._opened(), self._ends, columns, rows)
        try:
            return self._cursors[columns].row(index)
        except _ARROW_ERRORS as error:
            raise self._broken(error) from error

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        images = set(columns) & (self._bytes | self._structs)
        file = self._opened()
        if not columns:  # all that was asked for is only announced
            yield from (_Nothing(end - start) for start, end in itertools.pairwise([0, *self._ends]))
            return
        try:
            yield from file.iter_batches(_IMAGE_ROWS if images else _SCAN_ROWS, columns=columns, use_threads=False)
        except _ARROW_ERRORS as error:
            raise self._broken(error) from error

    def _scanned(self, column: Any, name: str) -> list[Any]:
        """Values, with bytes announced instead of copied."""
        if name in self._bytes:
            return [UNREAD_IMAGE if valid else None for valid in column.is_valid().to_pylist()]
        if name in self._structs:
            return _announced(column)
        values: list[Any] = column.to_pylist()
        return values

    def _opened(self) -> Any:
        parquet = parquet_module(self.path)
        try:
            return parquet.ParquetFile(self.path, buffer_size=_BUFFER_BYTES, memory_map=False, pre_buffer=False)
        except _ARROW_ERRORS as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> DataError:
        return DataError(f"table {self.path} cannot be read: {error}", fix="check the file; Parquet was expected")


class _Nothing:
    """A batch without columns."""

    def __init__(self, rows: int) -> None:
        self.num_rows = rows


class _Cursor:
    """Where one process is in a file: one open row group, a few of its rows decoded."""

    def __init__(self, file: Any, ends: list[int], columns: tuple[str, ...], rows: int) -> None:
        self._file, self._ends, self._columns, self._rows = file, ends, columns, rows
        self._group = -1
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None
        self._low = self._high = 0

    def row(self, index: int) -> dict[str, Any]:
        """The columns of one row."""
        group = bisect.bisect_right(self._ends, index)
        if group != self._group or index < self._low:
            self._group = group
            self._low = self._high = self._ends[group - 1] if group else 0
            self._batches = self._file.iter_batches(
                self._rows, row_groups=[group], columns=list(self._columns), use_threads=False
            )
        while index >= self._high:
            self._batch = None  # its rows go before the next ones come
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise ValueError("it has fewer rows than it says")
            self._low, self._high = self._high, self._high + self._batch.num_rows
        return {name: self._batch.column(name)[index - self._low].as_py() for name in self._columns}


def missing_column(where: str, name: str, have: Sequence[str]) -> DataError:
    """Error for a column that a table does not have."""
    return DataError(
        f"{where} has no column {name!r}; it has {', '.join(have) or 'none'}",
        fix="mend [columns] in the set's TOML file",
    )


def _types() -> Any:
    from pyarrow import types  # type: ignore[import-untyped]  # it has no annotations

    return types


def _never_null(metadata: Any, name: str) -> bool:
    """Whether the file says that every row has bytes in this column, or in the field `bytes` of this struct."""
    for group in range(metadata.num_row_groups):
        chunks = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
        found = [chunk for chunk in chunks if chunk.path_in_schema in (name, f"{name}.bytes")]
        counts = [chunk.statistics.null_count if chunk.statistics is not None else None for chunk in found]
        if counts != [0]:
            return False
    return True


def _announced(column: Any) -> list[Any]:
    """What each `{bytes, path}` struct of an array holds."""
    fields = {field.name for field in column.type}
    nothing = [None] * len(column)
    there = column.is_valid().to_pylist()
    embedded = column.field("bytes").is_valid().to_pylist() if "bytes" in fields else nothing
    paths = column.field("path").to_pylist() if "path" in fields else nothing
    return [(UNREAD_IMAGE if e else path) if t else None for t, e, path in zip(there, embedded, paths, strict=True)]
