"""Which keys there are, in a temporary file of its own: a hundred million of them do not fit into memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from uwm_deploy.errors import DataError

_CACHE_KIB = 64 << 10


class SeenKeys:
    """Keys that were embedded by earlier runs, and those met in this one."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("", isolation_level=None)  # a temporary file, removed by itself
        for statement in (
            "PRAGMA journal_mode=OFF",
            "PRAGMA synchronous=OFF",
            f"PRAGMA cache_size=-{_CACHE_KIB}",
            "CREATE TABLE keys (key TEXT PRIMARY KEY, met INTEGER) WITHOUT ROWID",
            "BEGIN",
        ):
            self._base.execute(statement)

    def add_finished(self, keys: Iterable[str], part: Path) -> None:
        """Keys of a part.

        Raises:
            DataError: If one of them is in another part too.
        """
        try:
            self._base.executemany("INSERT INTO keys VALUES (?, 0)", ((key,) for key in keys))
        except sqlite3.IntegrityError as error:
            raise DataError(
                f"{part} has a key that it or another part has already",
                fix="two jobs wrote here: start in a new folder",
            ) from error

    def is_new(self, key: str) -> bool:
        """Whether nothing has embedded this item; to be asked once per item of the source.

        Raises:
            DataError: If the source has the key twice, which a run that resumes must not take for finished.
        """
        row = self._base.execute("SELECT met FROM keys WHERE key = ?", (key,)).fetchone()
        if row is None:
            self._base.execute("INSERT INTO keys VALUES (?, 1)", (key,))
            return True
        if row[0]:
            raise DataError(f"two items have the key {key!r}", fix="give every item a key of its own")
        self._base.execute("UPDATE keys SET met = 1 WHERE key = ?", (key,))
        return False
