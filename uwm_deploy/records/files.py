"""Digests, atomic writes and locks.

A file is written to a temporary name, fsynced and renamed. A folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from uwm_deploy.errors import InputError
from uwm_deploy.records.locks import hold, release
from uwm_deploy.records.machine import disk_errors
from uwm_deploy.records.model import Digest
from uwm_deploy.records.replacing import WORKPLACE, remove, replacing, sync_folder, temporary_name

_CHUNK_BYTES = 1 << 20

_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")
"""Names of what is open already."""


def digest_of_bytes(data: bytes | bytearray | memoryview) -> Digest:
    """Digest of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_of_file(path: Path) -> Digest:
    """Digest of a file's bytes, read in chunks."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return "sha256:" + hasher.hexdigest()


def joined_digest(digests: Sequence[Digest]) -> Digest:
    """Digest of several parts in their order; of one part it is the part's own."""
    return digests[0] if len(digests) == 1 else digest_of_bytes(" ".join(digests).encode())


def digest_of_plain(value: Any) -> Digest:
    """Digest of plain data (dicts, lists, scalars), independent of key order."""
    return digest_of_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def digest_of_folder(folder: Path) -> Digest:
    """Digest over the relative paths and bytes of all files below a folder, in path order."""
    return digest_of_plain(_file_digests(folder))


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a whole file or nothing, and makes it durable."""
    with whole_file(path) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)


def write_output(path: Path, data: bytes | str) -> None:
    """Writes where a user wants a result: a file as `write_atomic` does, behind a link as well, or a device or a pipe.

    Raises:
        PrerequisiteError: If the machine failed.
        InputError: If nothing can be written there.
    """
    with disk_errors(path):
        stream = _is_open_already(path) or (path.exists() and _is_special(path.stat()))
    if not stream:
        write_atomic(path.resolve() if path.is_symlink() else path, data)
        return
    with disk_errors(path), path.open("ab") as file:  # /dev/stdout may be a file, which is not emptied
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file that becomes `path`, durably, when the block ends well, and disappears when it does not.

    Its name is always the same, and it is locked, so the next writer takes over the one that a killed process left.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and _is_special(path.lstat()):  # renaming would put a file in the place of a device
            raise InputError(f"{path} is in the way: it is no plain file", fix="choose another place")
        temporary, lock = _claimed(path)
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            release(lock)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and disappears when it does not; see `replacing`."""
    with replacing(path) as place, place.whole() as folder:
        yield folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a run folder; the lock dies with its process.

    Also removes what a killed build left behind, which is safe only under the lock.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = None
        while lock is None:
            lock = hold(folder / ".lock", f"another build is using {folder}", "wait for it or choose another --out")
    try:
        for left in folder.glob(f"{WORKPLACE}*"):
            remove(left)
        yield
    finally:
        release(lock)


def _is_open_already(path: Path) -> bool:
    return os.path.abspath(path).startswith(_STREAMS)


def _is_special(found: os.stat_result) -> bool:
    """Of a device, a pipe or a socket."""
    return not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) or stat.S_ISLNK(found.st_mode))


def _claimed(path: Path) -> tuple[Path, int]:
    """A temporary file beside a path, for this process alone, and the lock on it."""
    for name in (temporary_name(path.name), temporary_name(path.name, f"{os.getpid()}-")):
        with contextlib.suppress(InputError):  # somebody writes the same file now
            lock = None
            while lock is None:
                lock = hold(path.with_name(name), "", "", mode=0o666)
            return path.with_name(name), lock
    raise InputError(f"another command is writing {path}", fix="wait for it")


def _file_digests(folder: Path) -> dict[str, Digest]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): digest_of_file(p) for p in files}
