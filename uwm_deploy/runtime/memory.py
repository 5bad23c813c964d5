"""What to do when memory runs out: try again with half as much at a time, and say so. And when not to clear up."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from uwm_deploy.errors import PrerequisiteError

Notice = Callable[[str], None]

_MESSAGES = ("can't allocate memory", "not enough memory")
"""PyTorch's CPU allocator has no error type of its own."""


def silent(_: str) -> None:
    """A notice that nobody reads."""


def out_of_memory(error: Exception) -> bool:
    """Whether an error is torch's OutOfMemoryError, on any device, or a failed allocation on the CPU."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or isinstance(error, MemoryError) or any(text in str(error) for text in _MESSAGES)


def halved(size: int, error: Exception, what: str, notice: Notice) -> int:
    """Half the size, with one line about it; any other error is raised as it is.

    Args:
        size: What ran out of memory.
        error: What was raised.
        what: What there are `size` of.
        notice: Takes the line.

    Raises:
        PrerequisiteError: If one at a time is too many.
    """
    if not out_of_memory(error):
        raise error
    if size <= 1:
        raise PrerequisiteError(
            f"memory does not hold one of the {what}", fix="free memory, or use --device cpu"
        ) from error
    notice(f"out of memory with {size} {what} at a time; going on with {size // 2}")
    return size // 2


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Without the search for cyclic garbage, for work that makes many objects and hardly any garbage.

    Importing PyTorch's libraries, or tracing a model, otherwise spends a fifth of its time on searching all that there is.
    """
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


def give_back() -> None:
    """Gives free memory back to the system, which the C library keeps for itself, where it can be told so."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def leave_at_once(code: int) -> NoReturn:
    """Ends the process as `sys.exit` does, but leaves its memory to the system.

    With PyTorch and its libraries, taking modules and objects apart one by one takes seconds.
    """
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads, as the interpreter would
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads any more
            stream.flush()
    os._exit(code)
