"""The files of a bundle, each opened once: what was checked stays readable, whatever is put in the bundle's place later."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from uwm_deploy.errors import IntegrityError, UnreadableError, UwmError, is_of_machine
from uwm_deploy.records.model import Digest

RESTORE = "restore the bundle or build again"
MEND = "mend what is behind it (rights, limits, the disk), then run it again"

_CHUNK_BYTES = 1 << 20
_TRIES = 100
"""A file that is replaced while it is opened is opened again; nobody signs as often as this within a moment."""


class ReplacedError(Exception):
    """A file has been taken away since it was opened: the bundle, or its signature, is being replaced."""


class HeldFiles:
    """A folder and the files in it, held open; they are closed when nobody refers to this any more.

    Args:
        folder: The folder; a symbolic link is followed.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open: dict[str, int] = {}
        weakref.finalize(self, _close, self._folder, self._open)

    def __reduce__(self) -> NoReturn:
        raise TypeError("open files belong to one process")

    def is_at(self, path: Path) -> bool:
        """Whether this folder is the one that a path leads to."""
        try:
            return os.path.samestat(os.fstat(self._folder), path.stat())
        except FileNotFoundError:
            return False

    def has(self, name: str) -> bool:
        """Whether there is something of a name, a link that leads nowhere included."""
        try:
            os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def listing(self) -> tuple[dict[str, os.stat_result], set[str]]:
        """Every file, or what is neither file nor folder, with its status, and every folder, by their paths.

        Raises:
            ReplacedError: If something disappeared meanwhile.
        """

        def refused(error: OSError) -> None:
            raise error

        files: dict[str, os.stat_result] = {}
        folders: set[str] = set()
        try:
            for root, inner, names, descriptor in os.fwalk(".", dir_fd=self._folder, onerror=refused):
                for name in [*inner, *names]:
                    path = os.path.normpath(f"{root}/{name}")
                    status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        folders.add(path)
                    else:
                        files[path] = status
        except FileNotFoundError as error:
            raise ReplacedError from error
        except OSError as error:
            raise _cannot_be_read(str(error.filename or "the bundle"), error) from error
        return files, folders

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            IntegrityError: If it is not a plain file, or cannot be read.
            PrerequisiteError: If the machine failed.
        """
        return b"".join(self.chunks(name))

    def digest(self, name: str) -> Digest:
        """Digest of a file's bytes; see `read`."""
        hasher = hashlib.sha256()
        for chunk in self.chunks(name):
            hasher.update(chunk)
        return "sha256:" + hasher.hexdigest()

    def chunks(self, name: str) -> Iterator[bytes]:
        """Content of a file, some of it at a time; see `read`."""
        descriptor, at = self._held(name), 0
        try:
            while chunk := os.pread(descriptor, _CHUNK_BYTES, at):
                at += len(chunk)
                yield chunk
        except OSError as error:
            raise _cannot_be_read(name, error) from error

    def digests(self, name: str, part_bytes: int, threads: int) -> tuple[Digest, ...]:
        """Digests of the parts of a file, in order, several at a time; see `read`.

        Args:
            name: Of the file.
            part_bytes: Size of a part; the last one may be smaller.
            threads: Parts at a time.
        """
        descriptor, size = self._held(name), self.size(name)

        def part(start: int) -> Digest:
            hasher, end = hashlib.sha256(), min(start + part_bytes, size)
            while start < end and (chunk := os.pread(descriptor, min(_CHUNK_BYTES, end - start), start)):
                hasher.update(chunk)
                start += len(chunk)
            return "sha256:" + hasher.hexdigest()

        try:
            with ThreadPoolExecutor(threads) as pool:
                return tuple(pool.map(part, range(0, size, part_bytes)))
        except OSError as error:
            raise _cannot_be_read(name, error) from error

    def size(self, name: str) -> int:
        """Of a file, in bytes; see `read`."""
        return self.status(name).st_size

    def status(self, name: str) -> os.stat_result:
        """Of the file that is held, whatever has its name now; see `read`."""
        return os.fstat(self._held(name))

    def _held(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = _opened_plain(name, self._folder)
        return self._open[name]


def read_plain(folder: Path, name: str) -> bytes:
    """Content of a file that is neither a link nor one of several names of the same file.

    Raises:
        IntegrityError: If it is, or is not there.
        PrerequisiteError: If the machine failed.
    """
    try:
        return HeldFiles(folder).read(name)
    except ReplacedError as error:
        raise IntegrityError(f"{name} was taken away while it was read", fix=RESTORE) from error
    except OSError as error:
        raise _cannot_be_read(name, error) from error


def check_plain(name: str, status: os.stat_result) -> None:
    """Refuses what is not a plain file with one name.

    Raises:
        IntegrityError: If it is a folder, a device, or has several names.
        ReplacedError: If it has no name any more.
    """
    if stat.S_ISLNK(status.st_mode):
        raise IntegrityError(f"{name} is a symbolic link", fix=RESTORE)
    if not stat.S_ISREG(status.st_mode):
        raise IntegrityError(f"{name} is not a plain file", fix=RESTORE)
    if status.st_nlink == 0:
        raise ReplacedError(name)
    if status.st_nlink != 1:
        # Whoever holds the other name can change the file after it was checked.
        raise IntegrityError(f"{name} is a hard link: the file has another name too", fix="copy the bundle")


def _opened_plain(name: str, folder: int) -> int:
    for _ in range(_TRIES):
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except OSError as error:
            raise _cannot_be_read(name, error) from error
        try:
            check_plain(name, os.fstat(descriptor))
            return descriptor
        except ReplacedError:
            os.close(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
    raise ReplacedError(name)


def _cannot_be_read(name: str, error: OSError) -> UwmError:
    if error.errno == errno.ELOOP:
        return IntegrityError(f"{name} is a symbolic link", fix=RESTORE)
    if is_of_machine(error):
        return UnreadableError(f"{name} cannot be read: {error.strerror}", fix=MEND)
    return IntegrityError(f"{name} cannot be read: {error.strerror}", fix=RESTORE)


def _close(folder: int, files: dict[str, int]) -> None:
    for descriptor in (folder, *files.values()):
        with contextlib.suppress(OSError):
            os.close(descriptor)
