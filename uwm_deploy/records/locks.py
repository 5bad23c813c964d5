"""Locks that die with their process, even where it had forked others."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from uwm_deploy.errors import InputError

_HELD: set[int] = set()


def hold(path: Path, busy: str, fix: str, *, mode: int = 0o600, wait: bool = False) -> int | None:
    """Locks a file, which is made if there is none; a link is not followed, and nothing in the file is changed.

    Args:
        path: The file.
        busy: What to say if another process has it.
        fix: What to do then.
        mode: Of the file, if it is made.
        wait: Until the other process gives it back.

    Returns:
        For `release`; None if the file was taken away meanwhile, so that there is no lock.

    Raises:
        InputError: If another process has it, or a link or a folder is in the way.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise InputError(f"{path} is in the way: it is no plain file", fix="remove it") from error
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise InputError(busy, fix=fix) from None  # nothing of the machine failed
        raise
    if not _is_at(descriptor, path):
        os.close(descriptor)
        return None
    _HELD.add(descriptor)
    return descriptor


def release(lock: int) -> None:
    """Gives a lock back."""
    if lock in _HELD:  # not in a process that was forked meanwhile
        _HELD.discard(lock)
        os.close(lock)


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def _forget() -> None:
    """A forked process would keep the locks of one that was killed."""
    for descriptor in _HELD:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget)
