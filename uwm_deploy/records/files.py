"""Digests, atomic writes and locks.

A file is written to a temporary name, fsynced and renamed. A folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from uwm_deploy.errors import InputError, PrerequisiteError
from uwm_deploy.records.model import Digest

_TEMPORARY = ".tmp-"
_CHUNK_BYTES = 1 << 20


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


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turns a full disk or a read-only folder into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PrerequisiteError(
                f"no space left while writing {where}", fix="free space or choose another --out"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(f"{where} cannot be written: {error.strerror}", fix="choose another --out") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise InputError(f"{where} is in the way: {error.strerror}", fix="choose another --out") from error
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a whole file or nothing, and makes it durable."""
    with whole_file(path) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file that becomes `path`, durably, when the block ends well, and disappears when it does not."""
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and disappears when it does not."""
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        with disk_errors(path):
            yield temporary
            _sync(temporary)
            _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a run folder; the lock dies with its process.

    Also removes what a killed build left behind, which is safe only under the lock.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("w")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another build is using {folder}", fix="wait for it or choose another --out") from error
        for left in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def _file_digests(folder: Path) -> dict[str, Digest]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): digest_of_file(p) for p in files}


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(new: Path, path: Path) -> None:
    """Puts `new` at `path`; an old folder is moved aside first, so `path` is never half old and half new."""
    old = path.with_name(f"{_TEMPORARY}{os.getpid()}-old-{path.name}")
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)
