"""Outputs on disk, row by row, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from uwm_deploy.errors import IntegrityError, unreadable
from uwm_deploy.records.files import digest_of_plain, write_atomic
from uwm_deploy.records.machine import disk_errors

Row = Mapping[str, str]

AGAIN = "remove this file, and run again: what is in it is made anew, and other files are kept"


class StoredRows:
    """One file of rows. Its name holds a digest of all that the rows depend on, so other settings begin another file.

    Attributes:
        file: The file.
        fields: What every row holds beside its key.
    """

    def __init__(
        self, folder: Path, subject: str, depends: Mapping[str, str], fields: Collection[str] = ("output",)
    ) -> None:
        mark = digest_of_plain(dict(depends)).removeprefix("sha256:")[:12]
        self.file = folder / f"{subject}-{mark}.jsonl"
        self.fields = tuple(fields)

    def read(self, keys: Sequence[Row], batch: int) -> list[Row]:
        """Whole batches of rows from the beginning; a row that was cut off, and what is after it, is made again.

        Args:
            keys: What every row must repeat, in order.
            batch: Rows that are made together.

        Raises:
            IntegrityError: If a row belongs to another input, or is no such row; if the file is no text.
        """
        rows: list[Row] = []
        text = self._text()
        for line in text.split("\n")[:-1]:  # what is behind the last line break was cut off
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        rows = rows[: len(keys)]
        if len(rows) < len(keys):
            rows = rows[: len(rows) // batch * batch]
        for number, (key, row) in enumerate(zip(keys, rows, strict=False), 1):
            self._check(number, key, row)
        return rows

    def _text(self) -> str:
        if not os.path.lexists(self.file):
            return ""
        try:
            return self.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(str(self.file), error, fix=AGAIN, kind=IntegrityError) from error

    def _check(self, number: int, key: Row, row: object) -> None:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in self.fields):
            raise IntegrityError(f"{self.file}: line {number} is no row of this release", fix=AGAIN)
        for name, value in key.items():
            if row.get(name) != value:
                told = f"line {number} is of {name} {row.get(name)!r}, and {value!r} comes there"
                raise IntegrityError(f"{self.file}: {told}", fix=AGAIN)

    def keep(self, rows: Sequence[Row]) -> None:
        """Replaces the file, once, before more is appended."""
        write_atomic(self.file, "".join(map(_line, rows)))

    def append(self, rows: Sequence[Row]) -> None:
        """Adds rows that were made together."""
        with disk_errors(self.file), self.file.open("a", encoding="utf-8") as stream:
            stream.write("".join(map(_line, rows)))


def _line(row: Row) -> str:
    return json.dumps(dict(row), ensure_ascii=False, sort_keys=True) + "\n"
