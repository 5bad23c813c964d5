"""What is dear to make is made once per run of the tests, whichever worker asks first, and changed by nobody."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

_SHARED = "made-once"
_STILL = ".made.json"


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Folder that all workers share. Look, never touch: who changes something works in a `copy_of` it.

    Args:
        factory: Of temporary folders of this worker.
        name: Of the folder, and of what is in it.
        make: Fills an empty folder; called by one worker, while the others wait.
    """
    shared = _shared(factory.getbasetemp()) / _SHARED
    shared.mkdir(exist_ok=True)
    folder = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / f"{name}{_STILL}").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed half-way
            folder.mkdir()
            make(folder)
            (shared / f"{name}{_STILL}").write_text(json.dumps(_digests(folder)))
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    """A folder of one's own with the same content.

    Args:
        folder: What is shared.
        to: The new folder, which may exist already.
    """
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


def changed_since(base: Path) -> list[str]:
    """Files of shared folders that are not what they were when they were made.

    Args:
        base: Folder of this run of the tests, not of one worker.
    """
    found = []
    for record in sorted((base / _SHARED).glob(f"*{_STILL}")):
        folder = record.with_name(record.name.removesuffix(_STILL))
        before, now = json.loads(record.read_text()), _digests(folder)
        found += [f"{folder.name}/{name}" for name in sorted(before.keys() | now) if before.get(name) != now.get(name)]
    return found


def _shared(own: Path) -> Path:
    """The folder of this run of the tests; its workers have one each in it."""
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def _digests(folder: Path) -> dict[str, str]:
    """Digest of every file, locks apart: taking one writes nothing that anybody reads."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
