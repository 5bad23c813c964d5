"""Outputs on disk, row by row, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.files import digest_of_plain, write_atomic
from uwm_deploy.records.machine import disk_errors

Row = Mapping[str, str]


class StoredRows:
    """One file of rows. Its name holds a digest of all that the rows depend on, so other settings begin another file.

    Attributes:
        file: The file.
    """

    def __init__(self, folder: Path, subject: str, depends: Mapping[str, str]) -> None:
        mark = digest_of_plain(dict(depends)).removeprefix("sha256:")[:12]
        self.file = folder / f"{subject}-{mark}.jsonl"

    def read(self, keys: Sequence[Row], batch: int) -> list[Row]:
        """Whole batches of rows from the beginning; a row that was cut off, and what is after it, is made again.

        Args:
            keys: What every row must repeat, in order.
            batch: Rows that are made together.

        Raises:
            IntegrityError: If a row belongs to another input.
        """
        rows: list[Row] = []
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        for line in text.split("\n")[:-1]:  # what is behind the last line break was cut off
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        rows = rows[: len(keys)]
        if len(rows) < len(keys):
            rows = rows[: len(rows) // batch * batch]
        for key, row in zip(keys, rows, strict=False):
            if any(row.get(name) != value for name, value in key.items()):
                raise IntegrityError(f"{self.file} holds a row of another input", fix="remove the file, and run again")
        return rows

    def keep(self, rows: Sequence[Row]) -> None:
        """Replaces the file, once, before more is appended."""
        write_atomic(self.file, "".join(map(_line, rows)))

    def append(self, rows: Sequence[Row]) -> None:
        """Adds rows that were made together."""
        with disk_errors(self.file), self.file.open("a", encoding="utf-8") as stream:
            stream.write("".join(map(_line, rows)))


def _line(row: Row) -> str:
    return json.dumps(dict(row), ensure_ascii=False, sort_keys=True) + "\n"
