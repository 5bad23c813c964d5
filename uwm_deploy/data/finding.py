"""Which files are there. What cannot be looked at is an error: the library would take it for absent, and go on with less."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from uwm_deploy.errors import is_of_machine, unreadable

_FIX = "check the path"


def is_file(path: Path | str) -> bool:
    """Whether a path leads to a plain file.

    Raises:
        UnreadableError: If this machine cannot tell.
    """
    return stat.S_ISREG(_mode(path))


def is_there(path: Path | str) -> bool:
    """Whether a path leads to anything; see `is_file`."""
    return bool(_mode(path))


def is_folder(path: Path | str) -> bool:
    """Whether a path leads to a folder; see `is_file`."""
    return stat.S_ISDIR(_mode(path))


def names_in(folder: Path | str) -> list[str]:
    """Names in a folder, sorted.

    Raises:
        DataError: If there is no such folder.
        UnreadableError: If this machine cannot read it.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(f"folder {folder}", error, fix=_FIX) from error


def short(path: Path | str) -> str:
    """Enough of a path to find the file; the whole of it would end up in reports, and tell of this machine."""
    return str(Path(*Path(path).parts[-2:]))


def walked(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Every folder below one, as `os.walk` does; one that cannot be read is not passed over.

    Raises:
        UnreadableError: If this machine cannot read one of them.
    """

    def refuse(error: OSError) -> None:
        raise unreadable(f"folder {error.filename}", error, fix=_FIX) from error

    return os.walk(folder, onerror=refuse)


def matching(pattern: str, folder: Path) -> list[Path]:
    """Files and folders that a path with wildcards stands for, sorted; hidden ones are named or left out.

    Args:
        pattern: Wildcards of `glob` in any part of it; relative to the folder, or absolute.
        folder: Where it starts.

    Raises:
        UnreadableError: If this machine cannot read a folder on the way.
    """
    found = [folder]
    for part in Path(pattern).parts:
        if not glob.has_magic(part):
            found = [path for path in (start / part for start in found) if _mode(path)]
            continue
        found = [
            start / name
            for start in found
            if is_folder(start)
            for name in fnmatch.filter(names_in(start), part)
            if part.startswith(".") or not name.startswith(".")
        ]
    return sorted(found, key=str)


def _mode(path: Path | str) -> int:
    """Type and rights of what is at a path; 0 for nothing."""
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if is_of_machine(error):
            raise unreadable(str(path), error, fix=_FIX) from error
        return 0
