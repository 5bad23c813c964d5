"""Patterns over the columns of a row, such as ``"coco/{coco_id:012d}.jpg"``, and paths that stay in their folder."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from uwm_deploy.errors import DataError

_FORMATS = re.compile(r"0?[1-9]?\d?d|s|")
"""Width and kind of a field; anything else of Python's format language is refused."""

_NUMBER = re.compile(r"[0-9]{1,18}")


class Pattern:
    """Text with column names in braces; a number can be padded, as in ``{id:012d}``.

    Args:
        text: The pattern.
        where: Where it stands, for errors.

    Raises:
        DataError: If it is not one.
    """

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        try:
            self._parts = [(before, name, form) for before, name, form, _ in _parsed(text)]
        except ValueError as error:
            raise DataError(f"{where}: {text!r} is no pattern: {error}", fix="write it like {id:012d}.jpg") from error
        self.columns = tuple(dict.fromkeys(name for _, name, _ in self._parts if name))

    def fill(self, row: Mapping[str, Any]) -> str | None:
        """The text for one row; None when one of its columns is empty there.

        Raises:
            DataError: If a value does not fit its place.
        """
        filled = []
        for before, name, form in self._parts:
            filled.append(before)
            if not name:
                continue
            value = row.get(name)
            if value is None or value == "":
                return None
            filled.append(self._field(value, name, form))
        return "".join(filled)

    def _field(self, value: Any, name: str, form: str) -> str:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of integers with gaps is read as one of floats
        if form.endswith("d") and isinstance(value, str) and _NUMBER.fullmatch(value):
            value = int(value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and (form.endswith("d") or not isinstance(value, str)):
            raise DataError(
                f"{self.where}: column {name!r} holds {str(value)[:40]!r}, which does not fit {self.text!r}",
                fix="name a column with whole numbers or texts",
            )
        return format(value, form if form.endswith("d") else "")


def _parsed(text: str) -> list[tuple[str, str, str, str]]:
    found = []
    for before, name, form, conversion in string.Formatter().parse(text):
        if name is not None and not name.isidentifier():
            raise ValueError(f"{name!r} is no column name")
        if conversion or not _FORMATS.fullmatch(form or ""):
            raise ValueError(f"{name!r} has a format of its own")
        found.append((before, name or "", form or "", ""))
    return found


def path_below(folder: Path, text: str, where: str) -> Path:
    """A path that a row gives, below the folder of its set.

    Raises:
        DataError: If it leads out of the folder, or cannot be a path.
    """
    if text.startswith("/") or ".." in PurePosixPath(text).parts or "\0" in text:
        raise DataError(
            f"{where}: image path {text[:80]!r} leaves the set's folder", fix=f"use paths that are below {folder}"
        )
    return folder / text
