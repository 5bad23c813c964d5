"""The one place where what a library raises while it loads a checkpoint becomes an error of ours."""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Iterator

from uwm_deploy.errors import InputError, PrerequisiteError, UwmError
from uwm_deploy.runtime.memory import out_of_memory

_OF_THE_MACHINE = frozenset(
    {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.ESTALE, errno.ETIMEDOUT}
)
"""Failures of a disk or of limits, which say nothing about a file's content."""

MEND = "correct that entry, or fetch the checkpoint again"


@contextlib.contextmanager
def refusals(what: str, *, fix: str = MEND) -> Iterator[None]:
    """Turns whatever is raised inside the block into an error of one line; errors of ours pass as they are.

    Libraries raise every type for a value that they did not expect, so nothing narrower would do.

    Args:
        what: What is wrong then, and where: the file's name is in it.
        fix: How to mend it.

    Raises:
        InputError: With the library's own reason.
        PrerequisiteError: If the machine failed, and not the files.
    """
    try:
        yield
    except UwmError:
        raise
    except Exception as error:
        raise _refusal(what, fix, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of tokenizers, which derives it from no Exception
            raise
        raise _refusal(what, fix, error) from error


def _refusal(what: str, fix: str, error: BaseException) -> UwmError:
    line = reason(error)
    if isinstance(error, Exception) and out_of_memory(error):
        return PrerequisiteError(f"{what}: memory does not hold it ({line})", fix="free memory, or check its sizes")
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return PrerequisiteError(f"{what}: {line}", fix="mend the machine and try again; the files may be whole")
    return InputError(f"{what}: {line}", fix=fix)


_LONGEST = 200


def reason(error: BaseException) -> str:
    """What an error says, in one short line; its type, or the line that raised it, where it would mean nothing."""
    line = " ".join(str(error).split())
    if type(error).__name__.startswith("StrictDataclass"):  # of Hugging Face: names of its own types come first
        return line.rpartition("Error: ")[2][:_LONGEST]
    if not line and (raised := traceback.extract_tb(error.__traceback__)[-1:]):
        line = raised[0].line or ""
    said = isinstance(error, (OSError, RuntimeError, ValueError)) and bool(str(error))
    return line[:_LONGEST] if said else f"{type(error).__name__}: {line[:_LONGEST]}"
