"""Failures of the machine: a full disk, a limit, a broken device. They say nothing about what was read or written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from uwm_deploy.errors import InputError, PrerequisiteError, UwmError, is_of_machine

_FIXES: Mapping[int, tuple[str, str]] = {
    errno.ENOSPC: ("no space left on the disk", "free space or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free space or choose another place"),
    errno.EFBIG: ("the limit of a file's size is reached", "raise it (`ulimit -f`), or use another file system"),
    errno.EMFILE: ("too many files are open", "raise the limit (`ulimit -n`)"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs, or raise the limit"),
    errno.ENOMEM: ("not enough memory", "raise the limit, or use smaller batches or fewer workers"),
    errno.EIO: ("the disk or the network failed", "look at the machine's log, then run it again"),
    errno.ESTALE: ("the network file system lost the file", "run it again"),
    errno.ENOLCK: ("the file system gives no locks", "choose another place"),
    errno.EAGAIN: ("no more threads or processes", "raise the limit (`ulimit -u`, `ulimit -v`), or use fewer workers"),
    errno.EREMOTEIO: ("the disk or the network failed", "look at the machine's log, then run it again"),
}
"""Error number to what it means and what helps."""

_OS_ERROR = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]|errno: (\d+)")
"""How libraries in other languages name the number: safetensors and tokenizers, Arrow, FAISS."""

_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|std::bad_alloc|bad allocation|failed to allocate|out of memory"
    r"|malloc of size|realloc of size|failed to map segment",
    re.IGNORECASE,
)
"""How libraries say it that know no number."""


_NO_THREAD = "can't start new thread"
"""How Python says it, without a number."""

_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")
"""How numpy says that a file did not take everything; why, it does not know."""

_WORKER_LOST = re.compile(
    r"process pool was terminated abruptly|DataLoader worker .*(exited unexpectedly|killed by signal)"
)
"""How libraries say that a process that they had started is gone."""

_IN_PLACE = (errno.EXDEV, errno.EBUSY)
"""Of a folder that has to stay where it is."""


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turns a failure of the machine or a place that cannot be written into one clear line.

    Args:
        where: What is written.

    Raises:
        PrerequisiteError: If the machine failed; see `failure_of_machine`.
        InputError: If nothing can be written there.
    """
    try:
        yield
    except Exception as error:
        if failure := failure_of_machine(error, where):
            raise failure from error
        if isinstance(error, OSError) and (refused := _refused(error, where)):
            raise refused from error
        raise


def _refused(error: OSError, where: Path) -> UwmError | None:
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return InputError(f"{where} cannot be written: {error.strerror}", fix="choose another place")
    if error.errno == errno.ENAMETOOLONG:
        return InputError(f"{where} cannot be written: its name is too long", fix="choose a shorter one")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP):
        return InputError(f"{where} is in the way: {error.strerror}", fix="choose another place")
    if error.errno == errno.ENOENT and not where.exists():  # as below /proc, where nothing can be made
        return InputError(f"{where} cannot be made: {error.strerror}", fix="choose another place")
    if error.errno in _IN_PLACE:
        what = f"{where} cannot be replaced: it is a mount point, or part of a container's image"
        return PrerequisiteError(what, fix="work on a copy, or mount the folder above it")
    return None


def failure_of_machine(error: BaseException, where: str | os.PathLike[str] = "") -> PrerequisiteError | None:
    """What to say about an error that a failure of the machine is behind; None where there is no such failure.

    An error of this package that was raised because of one says what was read or written, so its words are kept. Input that
    asks for more memory than there could be is no such failure.

    Args:
        error: What was raised.
        where: What was read or written, if the error does not say it.
    """
    if isinstance(error, PrerequisiteError):
        return None
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, RuntimeError) and _WORKER_LOST.search(str(found)[:2000]):
            what = "a worker process was killed: is there enough memory?"
            return PrerequisiteError(what, fix="use fewer workers (--workers) or smaller batches")
        of_input = isinstance(found, MemoryError) and isinstance(error, UwmError) and not is_of_machine(found)
        if not of_input and (number := _number_of(found)) in _FIXES:
            what, fix = _FIXES[number]
            name = _name_of(found) or os.fspath(where)
            if isinstance(error, UwmError) and error.what:
                return PrerequisiteError(f"{what} ({error.what})", fix=fix)
            return PrerequisiteError(f"{what}: {name}" if name else what, fix=fix)
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return None


def _number_of(error: BaseException) -> int:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, UwmError):
        return 0
    text = str(error)[:2000]
    if numbers := _OS_ERROR.search(text):
        return int(next(filter(None, numbers.groups())))
    if _CUT_SHORT.search(text):
        return errno.ENOSPC
    if _NO_THREAD in text:
        return errno.EAGAIN
    if named := [number for number in _FIXES if os.strerror(number) in text]:
        return named[0]
    # ONNX Runtime's errors share no base class with Python's.
    of_library = isinstance(error, (RuntimeError, ImportError)) or type(error).__module__.startswith("onnxruntime")
    return errno.ENOMEM if of_library and _NO_MEMORY.search(text) else 0


def _name_of(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return str(Path(os.fsdecode(name))) if isinstance(name, (str, bytes, os.PathLike)) else ""
