"""Rows of an Arrow file, as Hugging Face `datasets` saves a set: mapped into memory, so that only what is read is loaded."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uwm_deploy.data.parquet import UNREAD_IMAGE, announced_images, missing_column, parquet_errors
from uwm_deploy.data.rows import Row
from uwm_deploy.errors import imported

ARROW = (".arrow",)
"""Endings of such a file's name."""

_FILE_MAGIC = b"ARROW1"


class ArrowRows:
    """Rows of one Arrow file, of the stream or of the file format.

    Args:
        path: The file.

    Raises:
        DataError: If it is broken.
        PrerequisiteError: If pyarrow is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        pyarrow = imported("pyarrow", f"{path.name} needs pyarrow", fix="install it: pip install 'uwm-deploy[build]'")
        with parquet_errors(f"table {path}", fix="check the file; Arrow was expected"):
            mapped = pyarrow.memory_map(str(path))
            if bytes(mapped.read(len(_FILE_MAGIC))) == _FILE_MAGIC:
                file = pyarrow.ipc.open_file(mapped)
                self._batches = [file.get_batch(i) for i in range(file.num_record_batches)]
                names = file.schema.names
            else:
                mapped.seek(0)
                stream = pyarrow.ipc.open_stream(mapped)
                self._batches, names = list(stream), stream.schema.names
        self.columns: tuple[str, ...] = tuple(names)
        self._ends = list(itertools.accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """See `rows.Rows`; image bytes are only announced, by `UNREAD_IMAGE`."""
        for name in columns:
            if name not in self.columns:
                raise missing_column(self.path.name, name, self.columns)
        number = 0
        for batch in self._batches:
            with parquet_errors(f"table {self.path}", fix="check the file"):
                rows = {name: _scanned(batch.column(name)) for name in columns}
            for position in range(batch.num_rows):
                number += 1
                yield f"{self.path.name} row {number}", {name: values[position] for name, values in rows.items()}

    def get(self, index: int, columns: tuple[str, ...]) -> Row:
        """See `rows.Rows`; equally fast in any order."""
        number = bisect.bisect_right(self._ends, index)
        position = index - (self._ends[number - 1] if number else 0)
        with parquet_errors(f"table {self.path.name}", fix="check the file"):  # an item's error, which is recorded
            return {name: self._batches[number].column(name)[position].as_py() for name in columns}


def _scanned(column: Any) -> list[Any]:
    """Values, with images announced instead of copied."""
    from pyarrow import types  # type: ignore[import-untyped]  # it has no annotations

    if types.is_binary(column.type) or types.is_large_binary(column.type):
        return [UNREAD_IMAGE if valid else None for valid in column.is_valid().to_pylist()]
    if types.is_struct(column.type):
        return announced_images(column)
    values: list[Any] = column.to_pylist()
    return values
