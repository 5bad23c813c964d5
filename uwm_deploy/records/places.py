"""Where results go: told before anything is computed, when nothing can be written there or something else lies there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from uwm_deploy.errors import InputError
from uwm_deploy.records.machine import disk_errors

_OTHER = "choose another --out"


def check_place(out: Path, files: Collection[str] = ()) -> None:
    """Checks that a folder is there or can be made, and can be written. Nothing is left there.

    Args:
        out: The folder.
        files: Names that will be written in it.

    Raises:
        InputError: If a file or a link to nothing is in the way, or nothing can be written there.
        PrerequisiteError: If the machine failed.
    """
    with disk_errors(out):
        path = out.absolute()
        nearest = next(place for place in (path, *path.parents) if _is_there(place, out))
        for name in files:
            if os.path.lexists(there := out / name) and not there.is_file():
                raise InputError(f"{there} is in the way: it is no plain file", fix=_OTHER)
        try:
            tempfile.TemporaryFile(dir=nearest).close()
        except FileNotFoundError as error:  # as below /proc, where nothing can be made
            raise InputError(f"{out} cannot be made: {error.strerror}", fix=_OTHER) from error


def _is_there(place: Path, out: Path) -> bool:
    """Whether this part of a path is a folder; what is in the way is refused."""
    if place.is_symlink() and not place.exists():
        raise InputError(f"{place} is a link to nothing, so {out} cannot be made", fix=_OTHER)
    if place.exists() and not place.is_dir():
        raise InputError(f"{place} is no folder, so {out} cannot be made", fix=_OTHER)
    return place.exists()


def refuse_foreign(out: Path, mark: str, what: str) -> None:
    """A folder that holds something else is never replaced, and none is made where none can be; see `check_place`.

    Args:
        out: The folder.
        mark: File that is in every folder of its kind.
        what: What it would have to be, after "exists and".

    Raises:
        InputError: If it holds something else.
    """
    with disk_errors(out):
        if out.exists() and not (out / mark).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and {what}", fix="choose another --out or remove it")
    check_place(out)
