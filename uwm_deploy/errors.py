"""Errors a user can meet, and the exit code each kind ends with.

Every message is one line: what is wrong, where (file and key, item id), how to fix it. Exit codes are frozen;
`docs/reference/cli.md` lists them.
"""

from __future__ import annotations

import errno
import importlib
import mmap
import unicodedata
from enum import IntEnum
from typing import Any

LONGEST = 400
"""Characters of one piece of data that are shown; a longer one ends with an ellipsis."""

LONGEST_LINE = 4000
"""Characters of a line with several pieces."""

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode classes of characters that show nothing, reorder or break the text around them, or cannot be encoded."""


class ExitCode(IntEnum):
    """Exit codes of the `uwm-deploy` command."""

    PASS = 0
    INTERNAL = 1
    BAD_INPUT = 2
    GATE_FAILED = 3
    INCONCLUSIVE = 4
    INTEGRITY = 5
    ENVIRONMENT = 6


class UwmError(Exception):
    """Base of every error that is reported without a traceback.

    Args:
        what: What is wrong, and where.
        fix: How to fix it; appended to the message after a semicolon.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what = visible(" ".join(what.split()), LONGEST_LINE)
        self.fix = visible(" ".join(fix.split()), LONGEST_LINE)
        super().__init__(f"{self.what}; {self.fix}" if self.fix else self.what)


class InputError(UwmError):
    """Bad input or usage: an unknown name, a broken file, an unusable data set."""

    exit_code = ExitCode.BAD_INPUT


class RecipeError(InputError):
    """A TOML file (recipe, calibration set, policy) that does not follow its format."""


class DataError(InputError):
    """A calibration or evaluation set that cannot be used as it is."""


class MissingFileError(DataError):
    """A file that a set names is not there; it may come."""


class ContractError(UwmError):
    """A stage did not receive, or would not deliver, what its contract promises."""

    exit_code = ExitCode.GATE_FAILED


class IntegrityError(UwmError):
    """A digest, a signature or a format that must match does not."""

    exit_code = ExitCode.INTEGRITY


class EvidenceError(IntegrityError):
    """Files that are whole, and do not belong together: a verdict about another engine, a report that was not judged."""


class PrerequisiteError(UwmError):
    """This machine lacks something: a GPU, a provider, a package, disk space."""

    exit_code = ExitCode.ENVIRONMENT


class UnreadableError(PrerequisiteError):
    """This machine could not read something, which says nothing about what it is: never a fact about an item."""


class BusyError(PrerequisiteError):
    """More work is on its way than may be, and none of it was done in time."""


_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR})
_OF_THE_FILE = _MISSING | {errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENXIO}
"""What the system says of a path that leads to no file: the same tomorrow, and on another machine."""

_ENOUGH_BYTES = 400_000_000
"""More than any item takes: a machine that gives as much is not out of memory, and the file asked for too much."""


def is_of_machine(error: BaseException) -> bool:
    """Whether reading failed for a reason that says nothing about what was read: too many open files, a broken disk.

    Libraries that parse files raise `OSError` without a number for a file that is broken.

    Args:
        error: What reading has raised.
    """
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in _OF_THE_FILE
    return isinstance(error, MemoryError) and not _has_memory()


def _has_memory() -> bool:
    try:
        mmap.mmap(-1, _ENOUGH_BYTES).close()
    except (OSError, MemoryError):
        return False
    return True


def unreadable(what: str, error: BaseException, *, fix: str, kind: type[UwmError] | None = None) -> UwmError:
    """The error for a file that cannot be read: of bad input, or of the machine where that is the reason.

    This is the one rule for every reader: a file that is there and cannot be read, for want of a right as well, says nothing
    about the input, and ends with exit code 6.

    Args:
        what: What was read, by name.
        error: What reading has raised.
        fix: How to mend the input.
        kind: Of the error where the input is at fault; of a data set where it is left out.
    """
    reason = (error.strerror if isinstance(error, OSError) else "") or str(error) or "it takes too much memory"
    told = f"{what} cannot be read: {reason}"
    if is_of_machine(error):
        return UnreadableError(told, fix="mend that on this machine, and run again")
    if kind is not None:
        return kind(told, fix=fix)
    missing = isinstance(error, OSError) and error.errno in _MISSING
    return MissingFileError(told, fix=fix) if missing else DataError(told, fix=fix)


def imported(module: str, missing: str, *, fix: str) -> Any:
    """A module of a package that not every installation has.

    Args:
        module: Its full name.
        missing: What the user reads where it is missing.
        fix: How to install it.

    Raises:
        PrerequisiteError: If it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if "failed to map segment" in str(error):  # the package is there, and there is no room for it
            raise PrerequisiteError(f"not enough memory for {module}", fix="raise the limit (`ulimit -v`)") from error
        broken = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        raise PrerequisiteError(f"{missing}{broken}", fix=fix) from error


def first_line(error: BaseException, longest: int = 200) -> str:
    """What an error of another library says first; the name of its type where it says nothing.

    Args:
        error: Of any library.
        longest: Characters that are kept.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:longest]


def visible(text: str, longest: int = LONGEST) -> str:
    """One line in which every character can be seen: control, bidirectional, breaking and broken ones are written out.

    Args:
        text: Any text.
        longest: Characters that are kept.
    """
    short = text if len(text) <= longest else f"{text[: longest - 1]}…"
    if short.isprintable():
        return short
    return "".join(f"\\u{{{ord(c):x}}}" if is_hidden(c) else c for c in short)


def is_hidden(character: str) -> bool:
    """Whether a character must be written out to be seen."""
    return unicodedata.category(character) in _HIDDEN
