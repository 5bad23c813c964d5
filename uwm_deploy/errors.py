"""Errors a user can meet, and the exit code each kind ends with.

Every message is one line: what is wrong, where (file and key, item id), how to fix it. Exit codes are frozen; `docs/cli.md`
lists them.
"""

from __future__ import annotations

import importlib
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


class BusyError(PrerequisiteError):
    """More work is on its way than may be, and none of it was done in time."""


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
        broken = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        raise PrerequisiteError(f"{missing}{broken}", fix=fix) from error


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


def visible_lines(text: str) -> str:
    """The same for text of several lines, whose breaks are its own."""
    return "\n".join(visible(line, LONGEST_LINE) for line in text.split("\n"))


def is_hidden(character: str) -> bool:
    """Whether a character must be written out to be seen."""
    return unicodedata.category(character) in _HIDDEN
