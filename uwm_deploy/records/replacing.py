"""Replacing a folder as a whole: readers see the old one or the new one, and nothing is lost or left when it is killed.

What is made on the way lies in a workplace beside the folder, under a lock that dies with its process. The new folder and
the old one are exchanged by one system call. Where the file system has none, the old one is moved into the workplace first;
whoever comes next moves it back if the process was killed just then.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.errors import InputError
from uwm_deploy.records.locks import hold, release
from uwm_deploy.records.machine import disk_errors

WORKPLACE = ".tmp-"
"""Its name is this and the name of the folder, so a run folder's own clean-up takes it as well."""

_LOCK, _NEW, _OLD, _REPLACES = ".lock", "new", "old", "replaces"
_DONE = stat.S_ISVTX
"""Mode of a workplace in which nothing is left to do but to clear it: it goes with the folder itself, after all files."""

_LONGEST_NAME = 255
"""Bytes of a name in a folder."""

_DIGITS = 20
"""Of the number of a file, which has 64 bits."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""Without the call, by the file system, and by what filters system calls in a container."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """The right to replace a folder, held for as long as the block of `replacing` lasts.

    Attributes:
        path: The folder that is replaced, symbolic links resolved.
        folder: On the same file system, for what is made on the way; it disappears with its content.
        finished: A process that was killed had put its folder in place already, and only its clean-up was missing.
    """

    path: Path
    folder: Path
    finished: bool

    @contextlib.contextmanager
    def whole(self) -> Iterator[Path]:
        """A new folder that takes the place of the old one when the block ends well, and disappears when it does not."""
        new = self.folder / _NEW
        try:
            with disk_errors(self.path):
                remove(new)
                new.mkdir()
                self.folder.chmod(0o700)
                yield new
                _sync(new)
                self._put_in_place(new)
        finally:
            remove(new)
            remove(self.folder / _OLD)

    def put(self, name: str, content: bytes) -> None:
        """Writes a file into the folder, in place of one that is there; until it is whole it lies beside the folder."""
        temporary = self.folder / _NEW
        with disk_errors(self.path / name):
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self.path / name)
            sync_folder(self.path)

    def _put_in_place(self, new: Path) -> None:
        (self.folder / _REPLACES).write_text(str(_identity(self.path)))  # in one step: it is whole, or empty
        if not os.path.lexists(self.path):
            new.rename(self.path)
        elif not exchange(new, self.path):
            self.path.rename(self.folder / _OLD)
            new.rename(self.path)
        sync_folder(self.path.parent)
        self.folder.chmod(0o700 | _DONE)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Workplace]:
    """The right to replace a folder, for one process at a time; a symbolic link is followed first.

    What a killed process left is put right: the folder is there again, and what was beside it is gone. What fails when the
    new folder is in place already leaves things as a killed process would, so the next command knows that the work is done.

    Raises:
        InputError: If another process has it.
    """
    target = _resolved(path)
    folder = workplace_of(target)
    with disk_errors(path):
        lock = _entered(folder, path)
    try:
        with disk_errors(path):
            finished = _recovered(target, folder)
        yield Workplace(path=target, folder=folder, finished=finished)
    except BaseException:
        if _in_place(target, folder):
            release(lock)
        else:
            _left(folder, lock)
        raise
    _left(folder, lock)


def tidied(path: Path) -> None:
    """Puts right what a killed process left beside a folder, unless somebody is at work on it."""
    if workplace_of(_resolved(path)).is_dir():
        with contextlib.suppress(InputError), replacing(path):
            pass


def workplace_of(path: Path) -> Path:
    """Where things lie while a folder is replaced.

    Raises:
        InputError: If there is nothing beside it.
    """
    if not path.name:
        raise InputError(f"{path} is no folder that can be replaced", fix="pass the folder of a bundle")
    return path.with_name(temporary_name(path.name))


def temporary_name(name: str, mark: str = "") -> str:
    """Name of what lies beside a file or a folder until it is whole; a long name is shortened to what a file may have.

    Args:
        name: Of the file or the folder.
        mark: Set before the name, where there are several.
    """
    full = f"{WORKPLACE}{mark}{name}"
    if len(os.fsencode(full)) <= _LONGEST_NAME:
        return full
    return f"{WORKPLACE}{mark}{hashlib.sha256(os.fsencode(name)).hexdigest()}"


def displaced(path: Path) -> Path | None:
    """The folder that is being replaced, where it has no name of its own for a moment."""
    old = workplace_of(_resolved(path)) / _OLD
    return old if old.is_dir() and not old.is_symlink() else None


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step.

    Returns:
        Whether this system and file system can.

    Raises:
        OSError: If it was refused for another reason.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    sys.audit("os.rename", str(one), str(other), -1, -1)  # as Python's own renaming says it
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have no such thing
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # how Python names a link that leads to itself
        raise InputError(f"{path} is a symbolic link that leads nowhere", fix="choose another place") from error


def _entered(folder: Path, path: Path) -> int:
    """The lock of a workplace, which is made if there is none."""
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        with contextlib.suppress(FileNotFoundError):  # whoever had it has just taken it away
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise InputError(f"{folder} is in the way", fix="remove it")
            try:
                lock = hold(folder / _LOCK, f"another command is writing {path}", "wait for it")
            except OSError:
                with contextlib.suppress(OSError):  # as long as there is nothing in it, not even a lock
                    folder.rmdir()
                raise
            if lock is not None:
                return lock


def _left(folder: Path, lock: int) -> None:
    """Takes the workplace away: first what is in it, the lock last."""
    try:
        _cleared(folder)
        with contextlib.suppress(OSError):
            (folder / _LOCK).unlink()
            folder.rmdir()
    finally:
        release(lock)


def _recovered(target: Path, folder: Path) -> bool:
    """Puts right what a killed process left; whether its folder was in place already."""
    old = folder / _OLD
    if old.exists() and not os.path.lexists(target):
        old.rename(target)
        sync_folder(target.parent)
    if _in_place(target, folder):
        folder.chmod(0o700 | _DONE)
    finished = bool(folder.stat().st_mode & _DONE)
    _cleared(folder)
    return finished


def _in_place(target: Path, folder: Path) -> bool:
    """Whether the new folder took the place of the one that was there when it was about to."""
    before = _number_in(folder / _REPLACES)
    return before is not None and _identity(target) not in (0, before)


def _number_in(replaces: Path) -> int | None:
    """The identity that a killed process wrote; None where there is none, or where something else wrote the file."""
    if replaces.is_symlink() or not replaces.is_file():
        return None
    said = replaces.read_bytes()
    return int(said) if said.isdigit() and len(said) <= _DIGITS else None


def _cleared(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if path.name != _LOCK:
            remove(path)


def _identity(path: Path) -> int:
    """The number that a folder keeps when it is renamed; 0 where there is none."""
    return path.stat().st_ino if path.exists() else 0


def remove(path: Path) -> None:
    """Removes a file or a folder, read-only parts included."""
    if path.is_dir() and not path.is_symlink():
        for root, folders, _ in os.walk(path):
            for name in folders:
                if not (inner := Path(root) / name).is_symlink():
                    inner.chmod(0o700)
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
