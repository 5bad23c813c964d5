"""Rows of a Parquet file: a few rows at a time, so that images inside it never fill the memory."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uwm_deploy.data.null_counts import never_null
from uwm_deploy.data.rows import Row
from uwm_deploy.errors import DataError, imported, unreadable

_SCAN_ROWS = 1024
_IMAGE_ROWS = 16
"""Rows decoded at a time when images are among the columns."""

_BUFFER_BYTES = 1 << 20
"""A column is read in pieces of this size; without it a whole row group's column would be."""

_ARROW_ERRORS = (OSError, ValueError, KeyError, RuntimeError, MemoryError)
"""What pyarrow's own errors are kinds of."""


def parquet_module(path: Path) -> Any:
    """`pyarrow.parquet`.

    Args:
        path: What it is needed for.

    Raises:
        PrerequisiteError: If it is not installed.
    """
    return imported("pyarrow.parquet", f"{path.name} needs pyarrow", fix="install it: pip install 'uwm-deploy[build]'")


@contextlib.contextmanager
def parquet_errors(what: str, *, fix: str) -> Iterator[None]:
    """Turns what pyarrow raises for a file into one clear line.

    Args:
        what: The file, by name.
        fix: How to mend it.

    Raises:
        DataError: If it is broken.
        UnreadableError: If this machine cannot read it.
    """
    try:
        yield
    except _ARROW_ERRORS as error:
        raise unreadable(what, error, fix=fix) from error


def parquet_file(path: Path) -> Any:
    """A file opened by pyarrow, to be read a few rows at a time.

    Raises:
        DataError: If it is broken.
        PrerequisiteError: If pyarrow is missing, or this machine cannot read the file.
    """
    parquet = parquet_module(path)
    with table_errors(path):
        return parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, memory_map=False, pre_buffer=False)


def table_errors(path: Path) -> contextlib.AbstractContextManager[None]:
    """See `parquet_errors`."""
    return parquet_errors(f"table {path}", fix="check the file; Parquet was expected")


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
        file = parquet_file(path)
        metadata, schema = file.metadata, file.schema_arrow
        self.columns: tuple[str, ...] = tuple(schema.names)
        if len(set(self.columns)) != len(self.columns):
            raise DataError(f"table {path} names a column twice", fix="give every column its name")
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(sizes))
        types = _types()
        self._bytes = {f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)}
        self._structs = {f.name for f in schema if types.is_struct(f.type)}
        self._whole = never_null(metadata, self._bytes | self._structs)
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
            with table_errors(self.path):
                rows = {name: self._scanned(batch.column(name), name) for name in read}
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
            self._cursors[columns] = _Cursor(parquet_file(self.path), self._ends, columns, rows)
        with parquet_errors(f"table {self.path.name}", fix="check the file"):  # an item's error, which is recorded
            return self._cursors[columns].row(index)

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        images = set(columns) & (self._bytes | self._structs)
        if not columns:  # all that was asked for is only announced
            yield from (_Nothing(end - start) for start, end in itertools.pairwise([0, *self._ends]))
            return
        file = parquet_file(self.path)
        with table_errors(self.path):
            yield from file.iter_batches(_IMAGE_ROWS if images else _SCAN_ROWS, columns=columns, use_threads=False)

    def _scanned(self, column: Any, name: str) -> list[Any]:
        """Values, with bytes announced instead of copied."""
        if name in self._bytes:
            return [UNREAD_IMAGE if valid else None for valid in column.is_valid().to_pylist()]
        if name in self._structs:
            return announced_images(column)
        values: list[Any] = column.to_pylist()
        return values


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


def announced_images(column: Any) -> list[Any]:
    """What each `{bytes, path}` struct of an array holds.

    Args:
        column: An array of pyarrow.
    """
    fields = {field.name for field in column.type}
    nothing = [None] * len(column)
    there = column.is_valid().to_pylist()
    embedded = column.field("bytes").is_valid().to_pylist() if "bytes" in fields else nothing
    paths = column.field("path").to_pylist() if "path" in fields else nothing
    return [(UNREAD_IMAGE if e else path) if t else None for t, e, path in zip(there, embedded, paths, strict=True)]
